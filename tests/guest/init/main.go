// Command init is everything a test guest runs: /init of its initramfs (or
// /sbin/init of a disk it boots from) and all the tools in it.
//
// It mounts proc, sys and dev, loads the modules listed in /lib/mod/order, moves
// to a root disk when the kernel's command line names one (kagami.root=/dev/vda2),
// starts the QEMU guest agent when there is one, and then answers commands on the
// virtio-serial port "org.kagami.control", else on ttyS0:
//
//	CMD id word word …      from the host
//	OUT id text             any number of lines
//	RC id 0|1               the end; 1 after an error, which is the last OUT line
//
// Commands run side by side, so a stalled disk does not keep others from being
// answered. Acknowledgements of the writer go to ttyS1 when it exists, else to ttyS0.
//
// Started as another process than number 1 it runs its arguments as one command.
package main

import (
	"fmt"
	"os"
	"strings"
)

func main() {
	if os.Getpid() != 1 {
		os.Exit(runTool(os.Args[1:]))
	}
	if err := boot(); err != nil {
		say("boot: %v", err)
	}
	serve()
}

// say prints a line on the console that also has the kernel's messages.
func say(format string, a ...any) {
	fmt.Fprintf(os.Stderr, "kagami-guest: "+strings.TrimSpace(format)+"\r\n", a...)
}

func runTool(args []string) int {
	g := &guest{acks: os.Stdout}
	out := func(l string) { fmt.Println(l) }
	if err := g.run(args, out); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if g.writer != nil {
		g.writer.Wait()
	}
	return 0
}
