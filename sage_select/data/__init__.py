"""From any file or table to tokenised pairs with stable ids, and out again."""
