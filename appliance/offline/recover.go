package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
	"kagami/images"
)

// RecoverOptions change what Recover does.
type RecoverOptions struct {
	DryRun bool
	// Out is where a recovered copy goes, which must not exist; the image stays as it
	// is. Empty: the image itself is changed.
	Out string
	// Copied, if not nil, is told how far the copy to Out is, in bytes of the image.
	Copied func(done, total int64)
}

// Recovery says what Recover found and did, or would do.
type Recovery struct {
	Image  string `json:"image"`
	Offset int64  `json:"offset"` // of the file system, bytes
	Size   int64  `json:"size"`   // of the room it is in, bytes
	Out    string `json:"out,omitempty"`
	DryRun bool   `json:"dry_run,omitempty"`
	recover.Report
}

// Recover replays the journal of a file system in an image. In place it is crash
// safe: broken off at any moment it can be repeated, and nobody mounts the file
// system as clean before (recover.Run). To another file, that file is there when
// it is complete and durable, and not before.
func Recover(ctx context.Context, path string, at Place, opts RecoverOptions) (Recovery, error) {
	var fsys images.FS = images.OS{}
	if opts.DryRun || opts.Out != "" {
		fsys = images.ReadOnly{}
	}
	img, err := open(fsys, path)
	if err != nil {
		return Recovery{}, err
	}
	r := Recovery{Image: path, Out: opts.Out, DryRun: opts.DryRun}
	err = r.run(ctx, img, at, opts)
	return r, errors.Join(err, img.Close())
}

func (r *Recovery) run(ctx context.Context, img *images.Image, at Place, opts RecoverOptions) error {
	where, err := at.find(img, img.Size())
	if err != nil {
		return err
	}
	r.Offset, r.Size = where.off, where.size
	if opts.DryRun || opts.Out == "" {
		return r.replay(img, at, opts.DryRun)
	}
	// Before a long copy: can it be done at all?
	if err := r.replay(img, at, true); err != nil {
		return err
	}
	out, err := images.MakeImage(images.OS{}, opts.Out, img.Size(), func(out *images.Image) error {
		if err := copyData(ctx, out, img, opts.Copied); err != nil {
			return err
		}
		return r.replay(out, at, false)
	})
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %s exists", ErrRefused, opts.Out)
	}
	if err != nil {
		return err
	}
	return out.Close()
}

// replay runs the replay and tells refusals from failures.
func (r *Recovery) replay(img *images.Image, at Place, dry bool) (err error) {
	r.Report, err = recover.Run(img, r.Offset, r.Size, recover.Options{DryRun: dry})
	return told(err, img, at)
}

// told gives an error of recover's this package's name.
func told(err error, img *images.Image, at Place) error {
	switch {
	case errors.Is(err, ext4.ErrNotExt4):
		return noFileSystem(img, img.Size(), at)
	case errors.Is(err, recover.ErrRefused):
		return &refusal{err}
	}
	return err
}

// refusal is an error of recover's under this package's name.
type refusal struct{ error }

func (r *refusal) Unwrap() error        { return r.error }
func (r *refusal) Is(target error) bool { return target == ErrRefused }

// copyStep is how much is copied at a time, in bytes.
const copyStep = 1 << 20

// copyData copies what is allocated in an image to a fresh one, and stops when ctx ends.
func copyData(ctx context.Context, to, from *images.Image, told func(done, total int64)) error {
	buf := make([]byte, copyStep)
	for off := int64(0); ; {
		start, end, err := from.NextData(off)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("copy: %w", err)
		}
		for off = start; off < end; {
			if ctx.Err() != nil {
				return fmt.Errorf("copy: %w", context.Cause(ctx))
			}
			p := buf[:min(copyStep, end-off)]
			if _, err := from.ReadAt(p, off); err != nil {
				return fmt.Errorf("copy: %w", err)
			}
			if _, err := to.WriteAt(p, off); err != nil {
				return fmt.Errorf("copy: %w", err)
			}
			off += int64(len(p))
			if told != nil {
				told(off, from.Size())
			}
		}
	}
}
