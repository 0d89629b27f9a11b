// The demo plays the whole path once, on a real libvirt VM: protect, lose the
// site, fail over, boot, and look for every record the guest was told is safe.
// `make demo` builds what it needs and runs it; it needs root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"kagami/tests/e2e/stage"
)

func main() {
	kagami := flag.String("kagami", "bin/kagami", "the kagami binary")
	keep := flag.Bool("keep", false, "leave everything running to look at; ends with Ctrl-C")
	disk := flag.Bool("from-disk", false, "a VM that boots from the protected disk")
	limit := flag.Duration("timeout", 10*time.Minute, "give up after this long")
	flag.Parse()
	if err := run(*kagami, *keep, *disk, *limit); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(kagami string, keep, disk bool, limit time.Duration) error {
	path, err := filepath.Abs(kagami)
	if err != nil {
		return err
	}
	signals, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(signals, limit)
	defer cancel()
	sum, err := stage.Story(ctx, stage.StoryOptions{Kagami: path, Out: os.Stdout, FromDisk: disk, Home: true, Keep: keep})
	if sum.Checked {
		fmt.Printf("\n%s", sum.Table())
	}
	if sum.Stage == nil {
		return err
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	fmt.Printf("\nEverything is left running; Ctrl-C ends it.\n  config files: %s %s\n  status: %s status --socket %s\n",
		sum.Stage.Main.Config(), sum.Stage.DR.Config(), path, filepath.Join(sum.Stage.Dir, stage.DRName, "run", "control.sock"))
	<-signals.Done()
	return errors.Join(err, sum.Stage.Close())
}
