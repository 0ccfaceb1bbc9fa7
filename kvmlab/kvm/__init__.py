"""KVM: attributes and memslots, the MMU and its fault path, guest_memfd, the platform's ops."""
