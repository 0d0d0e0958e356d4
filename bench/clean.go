// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/kind"
	"github.com/plimsoll-bench/plimsoll/clusters/kind/engine"
)

func newCleanCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "clean",
		Short: "remove what crashed or killed runs left on this host",
		Long: "Clean ends the processes and removes the cgroups, namespaces and folders of runs whose own process is gone.\n" +
			"Runs that are alive are left alone, and so are results.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("what runs leave belongs to root: run it as root (sudo plimsoll clean)")
			}
			found := false
			// Before what runs left in it, which goes along.
			left, err := engine.Clean(cmd.Context())
			if err != nil {
				return err
			}
			if left {
				found = true
				fmt.Fprintln(cmd.OutOrStdout(), "engine: removed")
			}
			err = host.Clean(cmd.Context(), kind.Remove, func(line string) {
				found = true
				fmt.Fprintln(cmd.OutOrStdout(), line)
			})
			if err == nil && !found {
				fmt.Fprintln(cmd.OutOrStdout(), "nothing to clean")
			}
			return err
		},
	}
}
