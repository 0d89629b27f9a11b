// Command kagami is a disaster-recovery appliance for libvirt VMs: the daemon
// that runs at both sites, and the command line that drives it.
//
// One file per command. Commands print results to standard output, progress
// and errors to standard error, and end with the exit codes of package control.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"kagami/appliance/control"
)

// app is what commands share: where they write, what time it is, and the
// persistent flags.
type app struct {
	out, err io.Writer
	tty      bool // err is a terminal: draw bars
	outTTY   bool // out is one: clear it between two tables
	width    int  // of the terminal, in columns
	now      func() time.Time
	environ  []string

	config string
	socket string
}

func main() {
	a := &app{out: os.Stdout, err: os.Stderr, now: time.Now, environ: os.Environ(), width: 80}
	if fd := int(os.Stderr.Fd()); term.IsTerminal(fd) {
		a.tty = true
		if w, _, err := term.GetSize(fd); err == nil && w > 0 {
			a.width = w
		}
	}
	a.outTTY = term.IsTerminal(int(os.Stdout.Fd()))
	// The first signal ends the command in an orderly way, the second at once.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// run executes a command line and returns its exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return control.ExitOK
	}
	var e *control.Error
	if !errors.As(err, &e) {
		// Not from a command's own run: cobra refused the command line.
		e = &control.Error{Message: err.Error(), Hint: "see " + cmd.CommandPath() + " --help", Exit: control.ExitUsage}
	}
	a.complain(e)
	return e.Exit
}

// complain prints an error: one sentence, and what to do next.
func (a *app) complain(e *control.Error) {
	_, _ = fmt.Fprintf(a.err, "kagami: %s\n", e.Message)
	if e.Hint != "" {
		_, _ = fmt.Fprintf(a.err, "  next: %s\n", e.Hint)
	}
}

// failed makes an error of any kind fit for complain.
func failed(err error) error {
	var e *control.Error
	if err == nil || errors.As(err, &e) {
		return err
	}
	return &control.Error{Code: "failed", Message: err.Error(), Exit: control.ExitFailed}
}

// action adapts a command's body to cobra.
func action(run func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error { return failed(run(cmd, args)) }
}

const rootLong = `kagami keeps a VM's disks in two places at once and starts the VM at the other
place when the first is lost. The same binary is the daemon of both sites and
this command line, which talks to the daemon of the machine it runs on.`

const rootExample = `  kagami protect web --to dr      # at the site where VM web runs
  kagami status --watch
  kagami failover web             # at the other site, on the day of the disaster`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use: "kagami", Short: "Disaster recovery for libvirt VMs", Long: rootLong, Example: rootExample,
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.PersistentFlags().StringVar(&a.config, "config", "", "configuration file (default "+defaultConfig+", or $KAGAMI_CONFIG)")
	root.PersistentFlags().StringVar(&a.socket, "socket", "", "control socket (default: the configuration's, or $KAGAMI_CONTROL_SOCKET)")
	root.AddCommand(
		a.daemonCmd(), a.protectCmd(), a.unprotectCmd(), a.statusCmd(), a.failoverCmd(),
		a.reprotectCmd(), a.failbackCmd(), a.switchoverCmd(), a.survivorCmd(), a.branchesCmd(), a.forgetCmd(), a.setCmd(), a.verifyCmd(),
		a.ext4Cmd(), a.configCmd(), a.pkiCmd(), a.versionCmd(),
		exitCodesTopic(), environmentTopic(),
	)
	helpCmd(root)
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			parentOnly(c)
		}
	}
	return root
}

func (a *app) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(a.out, format, args...)
}
