"""What any program needs: whole files, processes, heartbeats, progress bars, a cost ledger."""
