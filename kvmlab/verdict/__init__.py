"""What a search says: runs, their diagrams and codes, reports, the matrix, the claims."""
