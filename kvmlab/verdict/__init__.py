"""What a search says: runs and their codes, reports, the matrix, the claims."""
