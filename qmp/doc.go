// Package qmp puts the disks of libvirt VMs behind kagami's NBD sockets and
// takes them back, live; defines and starts replica VMs; and reports what
// happens to VMs. It is a leaf: it imports nothing of kagami.
//
// libvirtd owns each QEMU's monitor, so monitor commands go through libvirt: Monitor
// implements go-qemu's qmp.Monitor over it. All of libvirt's C library is in
// libvirt.go; the rest works on the domain and monitor it hands out, on XML and on JSON.
//
// Attach copies a disk to an NBD export with a block job and makes the running
// VM use it. Then, and after each start of the VM, the disk gets the reconnect treatment
// (Treat): libvirt's NBD node is replaced by one that waits for a server that
// is away, so that the guest stalls and never sees an error.
//
// Invariants:
//
//   - Until the pivot, an error leaves the VM as it was: the job is cancelled and
//     its nodes are gone. After it the VM runs from the export, whatever else fails.
//   - Work on one disk is serialised by the lock "VM/TARGET", held across calls to
//     libvirt and for as long as a copy takes; changes of one VM's definition by the lock
//     "VM", held for a read and a write of it. Order: disk, then VM. Libvirt.mu and
//     the other mutexes are taken last and never held across a call.
//   - An edit of a VM's definition replaces its <disk> element and kagami's own
//     metadata, and no other byte.
package qmp
