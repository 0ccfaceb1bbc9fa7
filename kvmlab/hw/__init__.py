"""Hardware rules: tables and pure functions; hardware knows nothing of the kernel."""
