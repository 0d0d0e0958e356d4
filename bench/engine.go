// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

// newEngineCommand is `plimsoll engine`: a container engine for machines that have none.
func newEngineCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "engine",
		Short: "start or stop a container engine for kind where there is none",
		Long: "Engine runs podman, unpacked from the distribution's packages into a cache, in network and mount namespaces of its\n" +
			"own: nothing is installed, and nothing of it reaches the host's network or rules. Where Docker or podman answer\n" +
			"already nothing is started.",
		Args: cobra.NoArgs,
	}
	var cache string
	start := &cobra.Command{
		Use: "start", Short: "unpack the engine once, and start it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if cache == "" {
				if cache, err = host.CacheDir(); err != nil {
					return err
				}
			}
			return engine.Start(cmd.Context(), cache, func(line string) { fmt.Fprintln(cmd.OutOrStdout(), line) })
		},
	}
	start.Flags().StringVar(&cache, "cache", "", "folder to unpack it into (default "+defaultCache+")")
	cmd.AddCommand(start, &cobra.Command{
		Use: "stop", Short: "stop the engine that start started, with all its containers", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("the engine belongs to root: run it as root (sudo)")
			}
			return engine.Stop(cmd.Context())
		},
	})
	return cmd
}

// newEngineHoldCommand is the process that holds the engine's namespaces.
func newEngineHoldCommand() *cobra.Command {
	return &cobra.Command{
		Use: engine.HoldCommand, Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return engine.Hold(cmd.Context(), args[0]) },
	}
}
