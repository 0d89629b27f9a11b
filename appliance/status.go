package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const statusLong = `Show this site's link to the others and its groups: one line each, or everything
about one VM. PROTECTED says whether every fsync that has returned in the VM
survives the loss of the site it runs at. RPO is the age of the newest moment the
replica could be recovered to. Lines that begin with ! are alarms.`

const statusExample = `  kagami status
  kagami status web
  kagami status -o wide
  kagami status --watch
  kagami status --json`

// statusFlags are the flags of status.
type statusFlags struct {
	json   bool
	watch  bool
	output string
	every  time.Duration
}

func (a *app) statusCmd() *cobra.Command {
	var f statusFlags
	cmd := &cobra.Command{
		Use: "status [VM]", Short: "What is protected, and how far the replicas are",
		Long: statusLong, Example: statusExample,
		Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			vm := ""
			if len(args) == 1 {
				vm = args[0]
			}
			return a.status(cmd.Context(), vm, f)
		}),
	}
	cmd.Flags().BoolVar(&f.json, "json", false, "write JSON")
	cmd.Flags().BoolVarP(&f.watch, "watch", "w", false, "show it again and again until interrupted")
	cmd.Flags().DurationVar(&f.every, "interval", time.Second, "how often --watch asks, at least 100ms")
	cmd.Flags().StringVarP(&f.output, "output", "o", "", "wide: more columns")
	mustBe(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"wide"}, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func (a *app) status(ctx context.Context, vm string, f statusFlags) error {
	if f.output != "" && f.output != "wide" {
		return usageError(fmt.Sprintf("output %q is not known", f.output), "use -o wide, or --json")
	}
	if f.every < 100*time.Millisecond {
		return usageError("--interval is too short", "use 100ms or more")
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if f.watch {
		return a.watch(ctx, c, vm, f)
	}
	st, err := a.ask(ctx, c, vm)
	if err != nil {
		return err
	}
	return a.show(st, vm, f)
}

// ask gets the status, of one VM if one is named.
func (a *app) ask(ctx context.Context, c *control.Client, vm string) (control.Status, error) {
	st, err := c.Status(ctx)
	if err != nil || vm == "" {
		return st, err
	}
	for _, g := range st.Groups {
		if g.Name == vm || g.VM == vm {
			st.Groups = []control.Group{g}
			return st, nil
		}
	}
	return st, &control.Error{Code: "not-found", Message: fmt.Sprintf("site %s has no group %s", st.Site, vm), Hint: "kagami status lists the groups of this site", Exit: control.ExitNotFound}
}

func (a *app) show(st control.Status, vm string, f statusFlags) error {
	switch {
	case f.json && f.watch:
		data, err := json.Marshal(st)
		if err != nil {
			return fmt.Errorf("write JSON: %w", err)
		}
		a.printf("%s\n", data)
	case f.json:
		return a.printJSON(st)
	case vm != "":
		a.printf("%s", groupText(st.Groups[0], a.now()))
	default:
		a.printf("%s", statusText(st, f.output == "wide", a.now()))
	}
	return nil
}

// watch asks until interrupted. A daemon that is away is shown as that: it may
// come back.
func (a *app) watch(ctx context.Context, c *control.Client, vm string, f statusFlags) error {
	tick := time.NewTicker(f.every)
	defer tick.Stop()
	for {
		if a.outTTY && !f.json {
			a.printf("\x1b[H\x1b[2J")
		}
		st, err := a.ask(ctx, c, vm)
		if ctx.Err() != nil {
			return nil
		}
		var e *control.Error
		switch {
		case err == nil:
			err = a.show(st, vm, f)
		case errors.As(err, &e) && e.Exit == control.ExitUnreachable:
			a.complain(e)
			err = nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if !a.outTTY && !f.json {
			a.printf("\n")
		}
	}
}
