// Command kagami-wan keeps an emulated long line between two network
// namespaces until it gets SIGINT or SIGTERM. It prints "ready" when both ends
// can talk. See package kagami/tests/wan for the control socket's protocol.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"kagami/tests/wan"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "kagami-wan:", err)
		os.Exit(1)
	}
}

type options struct {
	config  wan.Config
	control string
	send    string
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if o.send != "" {
		return send(ctx, o.control, o.send, out)
	}
	ln, err := wan.ListenControl(o.control)
	if err != nil {
		return err
	}
	defer ln.Close()
	l, err := wan.New(o.config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	fmt.Fprintf(out, "ready: %s %v, %s %v\n", o.config.Names[0], l.Addr(wan.A), o.config.Names[1], l.Addr(wan.B))
	return l.Serve(ctx, ln)
}

func parse(args []string) (options, error) {
	var o options
	var addrs [2]string
	var rate string
	p := wan.Params{}
	fs := flag.NewFlagSet("kagami-wan", flag.ContinueOnError)
	fs.StringVar(&o.config.Names[0], "a", "kagami-a", "network namespace of side a")
	fs.StringVar(&o.config.Names[1], "b", "kagami-b", "network namespace of side b")
	fs.StringVar(&addrs[0], "addr-a", "10.98.0.1/30", "address of side a")
	fs.StringVar(&addrs[1], "addr-b", "10.98.0.2/30", "address of side b")
	fs.DurationVar(&p.Delay, "delay", 10*time.Millisecond, "delay, one way")
	fs.DurationVar(&p.Jitter, "jitter", 0, "random delay on top, order kept")
	fs.StringVar(&rate, "rate", "1gbit", "bit/s each way, or unlimited")
	fs.Int64Var(&p.Queue, "queue", 0, "bytes that may wait for the line (0: one round trip at the rate)")
	fs.Float64Var(&p.Loss, "loss", 0, "probability of losing a packet")
	fs.Uint64Var(&o.config.Seed, "seed", 1, "seed of losses and jitter")
	fs.Int64Var(&o.config.Memory, "memory", 0, "bytes one direction may hold (0: 64 MiB)")
	fs.BoolVar(&o.config.Replace, "replace", false, "remove namespaces that an earlier run left behind")
	fs.StringVar(&o.control, "control", "kagami-wan.sock", "path of the control socket")
	fs.StringVar(&o.send, "send", "", "send this line to the control socket of a running kagami-wan and print the answer")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	var err error
	if p.Rate, err = wan.ParseRate(rate); err != nil {
		return o, err
	}
	for i, a := range addrs {
		if o.config.Addrs[i], err = netip.ParsePrefix(a); err != nil {
			return o, fmt.Errorf("address %q: %w", a, err)
		}
	}
	o.config.Params = wan.Symmetric(p)
	return o, nil
}

// send is the client of the control socket.
func send(ctx context.Context, path, line string, out io.Writer) error {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if _, err := fmt.Fprintln(c, line); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return fmt.Errorf("control socket: no answer to %q: %w", line, err)
	}
	if msg, ok := strings.CutPrefix(answer, "error: "); ok {
		return errors.New(strings.TrimSpace(msg))
	}
	_, err = io.WriteString(out, answer)
	return err
}
