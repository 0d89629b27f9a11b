package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
)

// version is the release; the Makefile sets it from git.
var version = "unknown"

// release is the version, or what Go recorded of the build.
func release() string {
	if version != "unknown" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return "git-" + s.Value[:12]
			}
		}
	}
	return version
}

type versions struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	Daemon  string `json:"daemon,omitempty"`
}

func (a *app) versionCmd() *cobra.Command {
	var json bool
	cmd := &cobra.Command{
		Use: "version", Short: "Versions of this command and of the running daemon",
		Long:    "Print the version of this command and, if the daemon answers, the daemon's.",
		Example: "  kagami version\n  kagami version --json",
		Args:    cobra.NoArgs, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: action(func(cmd *cobra.Command, _ []string) error {
			v := versions{Version: release(), Go: runtime.Version(), Daemon: a.daemonVersion(cmd.Context())}
			if json {
				return a.printJSON(v)
			}
			a.printf("kagami %s (%s)\n", v.Version, v.Go)
			if v.Daemon != "" {
				a.printf("daemon %s\n", v.Daemon)
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&json, "json", false, "write JSON")
	return cmd
}

// daemonVersion is "" when no daemon answers: that is no error here.
func (a *app) daemonVersion(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := a.client()
	if err != nil {
		return ""
	}
	v, err := c.Version(ctx)
	if err != nil {
		return ""
	}
	return v.Version
}
