"""The kernel around KVM: locks and context, the directmap."""
