// Package rounds plays disasters on declared disks with real daemons: a Rig is
// a stage with groups of declared disks, loads on them, and the checks that
// follow a disaster; Round is one random disaster, chosen by its seed.
//
// The end-to-end tests and the soak are made of it.
package rounds

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/tests/e2e/stage"
)

// Disk is one declared disk. Its image is made by the daemon unless it is there.
type Disk struct {
	Name string
	Size int64 // bytes
}

// Group is a declared group, whose source is at the main site.
type Group struct {
	Name  string
	Disks []Disk
}

// Options of a Rig.
type Options struct {
	Kagami string // path of the binary
	RTT    time.Duration
	Rate   int64 // bit/s
	// Connections between the sites; the configuration's default when 0.
	Connections int
	Disk        map[string]int64 // see stage.Options
	Limits      map[string]string
	Groups      []Group
}

// QuickLink are limits that make a lost line known within two seconds, and
// fit small disks.
func QuickLink() map[string]string {
	return map[string]string{"heartbeat": "300ms", "link_timeout": "2s", "apply_age": "200ms", "apply_bytes": "4MiB",
		"epoch_bytes": "1MiB", "segment_bytes": "1MiB", "spool_bytes": "96MiB", "active_log_bytes": "32MiB"}
}

// Rig is a stage with declared groups.
type Rig struct {
	*stage.Stage
	o     Options
	files []*Files
}

// Close ends what is still mounted, then the stage.
func (r *Rig) Close() error {
	var errs []error
	for _, f := range r.files {
		if f.mount != nil {
			errs = append(errs, f.Kill())
		}
	}
	return errors.Join(append(errs, r.Stage.Close())...)
}

// New builds a stage and declares the groups. The daemons are not started yet.
func New(ctx context.Context, o Options) (*Rig, error) {
	limits := "limits:\n"
	for _, k := range sortedKeys(o.Limits) {
		limits += fmt.Sprintf("  %s: %s\n", k, o.Limits[k])
	}
	if len(o.Limits) == 0 {
		limits = ""
	}
	s, err := stage.New(ctx, stage.Options{Kagami: o.Kagami, RTT: o.RTT, Rate: o.Rate, Connections: o.Connections, Disk: o.Disk,
		Extra: map[string]string{stage.MainName: limits, stage.DRName: limits}})
	if err != nil {
		return nil, err
	}
	r := &Rig{Stage: s, o: o}
	if err := r.declare(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return r, nil
}

func sortedKeys(m map[string]string) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// declare writes the groups into the main site's config file.
func (r *Rig) declare() error {
	var b strings.Builder
	b.WriteString("groups:\n")
	for _, g := range r.o.Groups {
		fmt.Fprintf(&b, "  - name: %s\n    peer: %s\n    disks:\n", g.Name, stage.DRName)
		for _, d := range g.Disks {
			fmt.Fprintf(&b, "      - name: %s\n        image: %s\n        size: %dB\n", d.Name, r.Image(g.Name, d.Name), d.Size)
		}
	}
	if err := os.MkdirAll(filepath.Dir(r.Image("x", "x")), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(r.Main.Config(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(b.String())
	return errors.Join(err, f.Close(), r.Main.Sync(), r.DR.Sync())
}

// Image is a disk's image at the main site.
func (r *Rig) Image(group, disk string) string {
	return filepath.Join(r.Main.StateDir(), "..", "disks", group+"-"+disk+".raw")
}

// Replica is a disk's image at the other site.
func (r *Rig) Replica(group, disk string) string {
	return filepath.Join(r.DR.StateDir(), "images", group, disk+".raw")
}

// Disks are the disks of a group.
func (r *Rig) Disks(group string) []Disk {
	for _, g := range r.o.Groups {
		if g.Name == group {
			return g.Disks
		}
	}
	return nil
}

// StartBoth starts both daemons.
func (r *Rig) StartBoth(ctx context.Context) error {
	for _, s := range []*stage.Site{r.DR, r.Main} {
		if err := s.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Await waits until the main site's group is in a state.
func (r *Rig) Await(ctx context.Context, group, state string) (control.Group, error) {
	return r.Main.AwaitGroup(ctx, group, "state "+state, func(g control.Group) bool { return g.State == state })
}

// AwaitProtected waits until every group streams and is protected.
func (r *Rig) AwaitProtected(ctx context.Context) error {
	for _, g := range r.o.Groups {
		if _, err := r.Main.AwaitGroup(ctx, g.Name, "protection",
			func(g control.Group) bool { return g.State == "streaming" && g.Protected }); err != nil {
			return err
		}
	}
	return nil
}

// AwaitConnections waits until the main site has all its connections to the other.
func (r *Rig) AwaitConnections(ctx context.Context) error {
	for {
		st, err := r.Main.Status(ctx)
		if err != nil {
			return err
		}
		if st.Peers[0].Connections == r.o.Connections {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d connections between the sites, want %d: %w", st.Peers[0].Connections, r.o.Connections, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// AwaitDrained waits until the other site has applied everything. Nobody may
// be writing.
func (r *Rig) AwaitDrained(ctx context.Context, group string) error {
	src, err := r.Main.AwaitGroup(ctx, group, "everything to be acknowledged",
		func(g control.Group) bool { return g.State == "streaming" && g.LSN.Assigned == g.LSN.Durable })
	if err != nil {
		return err
	}
	_, err = r.DR.AwaitGroup(ctx, group, "everything to be applied", func(g control.Group) bool { return g.LSN.Applied >= src.LSN.Assigned })
	return err
}

// Failover fails a group over at the other site, once its source is seen gone.
func (r *Rig) Failover(ctx context.Context, group string, flags ...string) (string, error) {
	if !slices.Contains(flags, "--force") {
		if _, err := r.DR.AwaitGroup(ctx, group, "the source to be gone", func(g control.Group) bool { return !g.PeerUp }); err != nil {
			return "", err
		}
	}
	return r.DR.Kagami(ctx, append([]string{"failover", group}, flags...)...)
}

// SameImages compares the images of a group at both sites, byte by byte. The
// replica's must have been drained.
func (r *Rig) SameImages(group string) error {
	for _, d := range r.Disks(group) {
		if err := same(r.Image(group, d.Name), r.Replica(group, d.Name)); err != nil {
			return err
		}
	}
	return nil
}

// same compares two files.
func same(a, b string) error {
	fa, err := os.Open(a)
	if err != nil {
		return err
	}
	defer fa.Close() // only read
	fb, err := os.Open(b)
	if err != nil {
		return err
	}
	defer fb.Close() // only read
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(pa)) {
		na, erra := fa.ReadAt(pa, off)
		nb, errb := fb.ReadAt(pb, off)
		for _, err := range []error{erra, errb} {
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
		}
		if na != nb {
			return fmt.Errorf("%s and %s have different sizes", a, b)
		}
		if !bytes.Equal(pa[:na], pb[:nb]) {
			i := 0
			for pa[i] == pb[i] {
				i++
			}
			return fmt.Errorf("%s and %s differ at byte %d", a, b, off+int64(i))
		}
		if na < len(pa) {
			return nil
		}
	}
}

// Fsck runs e2fsck -fn on an image.
func Fsck(ctx context.Context, image string) error {
	if out, err := exec.CommandContext(ctx, "e2fsck", "-fn", image).CombinedOutput(); err != nil {
		return fmt.Errorf("e2fsck -fn %s: %w: %s", image, err, out)
	}
	return nil
}

// Trouble is an error when a daemon's log holds what no run may produce.
func (r *Rig) Trouble() error {
	var errs []error
	for _, s := range []*stage.Site{r.Main, r.DR} {
		for _, line := range s.Trouble() {
			errs = append(errs, fmt.Errorf("log of site %s: %s", s.Name, line))
		}
	}
	return errors.Join(errs...)
}
