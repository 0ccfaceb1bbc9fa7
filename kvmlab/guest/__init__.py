"""Who acts: vCPUs in the guest and what their accesses meet; VMM threads, the host's kernel threads."""
