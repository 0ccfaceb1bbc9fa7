"""The kernel around KVM: locks and context, the direct map."""
