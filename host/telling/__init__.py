"""What a user is told: the text on a node, the account of each block, the report."""
