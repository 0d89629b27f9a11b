//go:build race

package ext4vectors

// everything: the race detector makes a trial about ten times slower.
const everything = false
