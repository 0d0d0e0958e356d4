// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/scenarios"
)

func newListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "list modes, scenarios, metrics and providers",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return list(cmd.OutOrStdout()) },
	}
}

func list(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MODES")
	for _, m := range dataplane.Modes {
		floor := ""
		if m.Floor() != "" {
			floor = "; held against " + m.Floor()
		}
		fmt.Fprintf(w, "  %s\t%s%s\n", m.Name(), m.Doc(), floor)
	}
	fmt.Fprintln(w, "SCENARIOS")
	for _, s := range scenarios.Scenarios {
		fmt.Fprintf(w, "  %s\t%s; targets %s\n", s.Name(), s.Doc(), strings.Join(s.Targets(), ", "))
	}
	fmt.Fprintln(w, "METRICS")
	for _, m := range scenarios.Metrics {
		fmt.Fprintf(w, "  %s\t%s\n", m.Name, m.Doc)
	}
	fmt.Fprintln(w, "PROVIDERS")
	for _, p := range providers {
		fmt.Fprintf(w, "  %s\t%s\n", p.Name(), p.Doc())
	}
	return w.Flush()
}
