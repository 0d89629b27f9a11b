package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
)

// Topics are commands that only have help.

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{Use: "exit-codes", Short: "Exit codes of every command", Long: `Exit codes of every command:

  0  done
  1  something went wrong on the way; the message says what was undone
  2  the command line or the configuration file is wrong
  3  refused: a precondition does not hold, and nothing was changed
  4  the daemon does not answer
  5  there is no such VM, disk, group or peer`}
}

func environmentTopic() *cobra.Command {
	names := append([]string{config.EnvConfig}, config.EnvNames()...)
	return &cobra.Command{Use: "environment", Short: "Environment variables", Long: `Environment variables. KAGAMI_CONFIG names the configuration file. Each of the
others overrides one key of it, for the daemon and for the command line; a
variable that is set but empty counts as not set, and one that begins with KAGAMI_
and is none of these is refused. The lists peers and groups can be changed in the
file only.

  ` + strings.Join(names, "\n  ")}
}

// parentOnly makes a command that only holds others: alone it prints its help,
// and what is none of the others is a mistake.
func parentOnly(cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.NoArgs // "unknown command"
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	return cmd
}

// helpCmd is cobra's own, but for topics that do not exist: those are a mistake.
func helpCmd(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		if c.Name() != "help" {
			continue
		}
		show := c.Run
		c.Run = nil
		c.RunE = func(cmd *cobra.Command, args []string) error {
			if found, _, err := root.Find(args); err != nil || len(args) > 0 && found.Name() != args[len(args)-1] {
				return fmt.Errorf("there is no command or topic %q", strings.Join(args, " "))
			}
			show(cmd, args)
			return nil
		}
	}
}

// oneVM wants the name of one VM.
func oneVM(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return fmt.Errorf("%s wants the name of one VM, not %s", cmd.CommandPath(), count(len(args), "argument"))
	}
	return nil
}
