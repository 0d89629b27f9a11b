// Package stage sets up two sites on one machine with real parts, for the demo
// and the end-to-end tests: two kagami daemons, each with its own config file,
// state folder, keys and network namespace, joined by an emulated long line
// (tests/wan), and at each site a libvirt of its own (tests/lab).
//
// Everything lives below one folder and is gone after Close. It needs root.
package stage
