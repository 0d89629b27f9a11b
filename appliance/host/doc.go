// Package host is the daemon's assembly. It owns the one state machine of each
// group (state.go), the durable description of each group (groupfile.go), and
// drives the parts: nbd exports, ext4j groups and links for sources
// (source.go, attach.go), replica groups and the peer server for replicas
// (receiver.go, accept.go), libvirt for attaching, detaching and booting VMs
// (protect.go, unprotect.go, failover.go), and the control API (backend.go).
//
// Invariants:
//
//   - The group file is durable before the daemon acts on what it says.
//   - A source raises its session, durably, before it takes its first write
//     and before every resync.
//   - A promotion is durable before the promoted group serves a single request.
//   - A group is in Daemon.groups from the moment its file exists until it is
//     removed; everything that belongs to it is stopped by its own stop method.
//
// Lock order: Daemon.mu, then group.mu. Neither is held during I/O on images,
// calls to a peer or calls to libvirt. Operations an operator asks for on one
// group exclude each other by group.op, a try-lock.
package host
