// Package follow knows, from the stream of writes to a disk alone, what its
// ext4 file systems and their journals have committed, and which writes can show
// nothing after a recovery.
package follow
