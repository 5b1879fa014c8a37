"""Read files and tables into tokenised pairs with stable ids, and export selected pairs."""
