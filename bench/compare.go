// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/results"
)

func newCompareCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "compare DIR DIR",
		Short: "compare two runs: the same verdicts, and ratios to the floor within the noise",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := results.Read(args[0])
			if err != nil {
				return err
			}
			b, err := results.Read(args[1])
			if err != nil {
				return err
			}
			c, err := results.Compare(a, b)
			if err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), c)
			if !c.Same() {
				return errors.New("the runs differ")
			}
			return nil
		},
	}
}
