// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/results"
)

func newReportCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "report DIR",
		Short: "render CSV, PNG and report.md of a run again from its records",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := render(args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "rendered %s/%s\n", args[0], results.ReportFile)
			return nil
		},
	}
}

// render makes everything in dir that can be made from its records.
func render(dir string) error {
	r, err := results.Read(dir)
	if err != nil {
		return err
	}
	return r.Render(dir)
}
