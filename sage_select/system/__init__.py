"""General infrastructure: durable files, processes, heartbeats, progress bars, a cost ledger."""
