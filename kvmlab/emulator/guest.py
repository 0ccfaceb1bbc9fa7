"""The guest: a vCPU, and what a Linux guest or a TD asks for with it."""

from __future__ import annotations

from . import alike, linux, psc, tdx_linux
from .arguments import FLAG, PAGE_ADDRESS, PAGES, takes, whole
from .events import PscError
from .memory import PAGE
from .vcpu import SIZE, Vcpu


class Guest(Vcpu):
    """vCPU `index` of a Vm.  The page table belongs to the guest: all vCPUs see the same C-bits.

    Addresses and sizes are in bytes; InputError for those that do not exist.  `vmpl` is the privilege level at which
    this vCPU runs.
    """

    @takes(
        gpa=PAGE_ADDRESS,
        size=PAGES,
        private=FLAG,
        page_size=SIZE,
        batch=whole(1, 0xFFFF, "entries, from 1 to 253"),
    )
    def page_state_change(
        self, gpa: int, size: int, private: bool, *, page_size: int = 1 << 21, batch: int = psc.MAX_ENTRIES
    ) -> None:
        """Ask for a conversion with PSC buffers of up to `batch` entries, 2M ones where they fit; PscError.

        tdx: by MapGPA, as Linux repeats it; MapGpaError.
        """
        if self.vm.tdx:
            tdx_linux.map_gpa(self, gpa, size, private)
            return
        self._snp("a page state change")
        if batch > psc.MAX_ENTRIES:
            raise PscError(psc.BAD_HEADER)

        def ask(gfn: int, pages: int) -> None:
            if code := psc.request(self.vmm, gfn, pages, private):
                raise PscError(code)

        for gfn, count, large in psc.plan(gpa // PAGE, (gpa + size) // PAGE, page_size != PAGE):
            unit = 512 if large else 1
            alike.run(self.vmm, gfn, gfn + count * unit, batch * unit, ask)

    @takes(gpa=PAGE_ADDRESS, size=PAGES)
    def set_memory_encrypted(self, gpa: int, size: int) -> None:
        """What a Linux guest does to go private; GuestTerminated, or tdx: SetMemoryFailed, if it gives up."""
        linux.set_memory_encrypted(self, gpa, size)

    @takes(gpa=PAGE_ADDRESS, size=PAGES)
    def set_memory_decrypted(self, gpa: int, size: int) -> None:
        """What a Linux guest does to go shared; errors as for `set_memory_encrypted`."""
        linux.set_memory_decrypted(self, gpa, size)
