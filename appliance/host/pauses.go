package host

import "time"

// pauses is how long the daemon waits before it tries something again, or before
// it gives up on somebody. Nothing that is promised depends on them; the tests
// shorten them.
type pauses struct {
	link     time.Duration // how long commands wait for a peer to be connected
	tend     time.Duration // between looks at disks that could not be treated, and at definitions, of whose changes libvirt does not always tell
	libvirt  time.Duration // before a lost connection to libvirt is made anew
	resume   time.Duration // keeps a VM that pauses on every request from being resumed in a tight loop
	farewell time.Duration // after a peer refused to remove its replica
	beside   time.Duration // between two looks of a promoted group at the other site
	apart    time.Duration // before a group goes on without a replica that is away, if that is its policy
	stuck    time.Duration // before a replica that is attached and makes no progress counts as away, then
	verify   time.Duration // between looks at which group is to be compared
	takeBack time.Duration // between two attempts to have the other site as the replica
}

var usualPauses = pauses{link: 10 * time.Second, tend: 30 * time.Second, libvirt: 2 * time.Second, resume: 5 * time.Second,
	farewell: 5 * time.Second, beside: 5 * time.Second, apart: 5 * time.Second, stuck: 15 * time.Second, verify: time.Minute, takeBack: 2 * time.Second}
