// Package offline works on images that no daemon serves: what `kagami ext4` does.
// It needs no root and no mount.
//
// Invariants: an image that is read is opened for reading; one that is changed is
// locked for as long as it is open, and refused while anybody else uses it. A
// refusal (ErrRefused, ErrInUse, ErrNotThere) means that nothing was changed.
package offline
