// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

func newDumpCommand() *cobra.Command {
	var pinDir, format string
	cmd := &cobra.Command{
		Use:   "dump",
		Short: "print what the embedded load balancer carries: frontends with their backends, from its maps",
		Long: `Dump prints each frontend that the maps pinned under --pin-dir hold, with its backends, whether or not an agent runs.
It reads them as the programs in the kernel do, and changes nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, ok := dumpFormats[format]
			if !ok {
				return fmt.Errorf("--output %q: want text or json", format)
			}
			if pinDir == "" {
				return errors.New("name the agent's folder: --pin-dir DIR")
			}
			frontends, err := lb.Dump(pinDir)
			if errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("%w; is an agent running with this --pin-dir?", err)
			}
			if err != nil {
				return err
			}
			return write(cmd.OutOrStdout(), frontends)
		},
	}
	cmd.Flags().StringVar(&pinDir, "pin-dir", "", "the agent's `folder` on a bpffs")
	cmd.Flags().StringVarP(&format, "output", "o", "text", "text or json")
	return cmd
}

var dumpFormats = map[string]func(io.Writer, []lb.Change) error{"text": dumpText, "json": dumpJSON}

func dumpText(out io.Writer, frontends []lb.Change) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FRONTEND\tAFFINITY\tCLIENTS\tBACKENDS")
	for _, f := range frontends {
		backends, clients := "none: refused", "all"
		switch {
		case len(f.Backends) > 0:
			backends = joined(f.Backends)
		case f.Drop:
			backends = "none: dropped"
		}
		if f.Masquerade {
			backends += " (masqueraded)"
		}
		if len(f.Lingering) > 0 {
			backends += " (lingering: " + joined(f.Lingering) + ")"
		}
		switch {
		case len(f.Ranges) > 0:
			clients = joined(f.Ranges)
		case f.Ranges != nil:
			clients = "none" // there was no room for its ranges
		}
		affinity := "none"
		if f.Affinity.Timeout > 0 {
			affinity = f.Affinity.Timeout.String()
		}
		fmt.Fprintf(w, "%v\t%s\t%s\t%s\n", f.Frontend, affinity, clients, backends)
	}
	return w.Flush()
}

func joined[T any](all []T) string {
	s := fmt.Sprint(all)
	return s[1 : len(s)-1]
}

// dumpedFrontend is a frontend as JSON has it.
type dumpedFrontend struct {
	Address    netip.AddrPort   `json:"address"`
	Protocol   string           `json:"protocol"`
	Scope      string           `json:"scope"`                  // inside, outside or rest
	Affinity   float64          `json:"affinity_seconds"`       // 0: none
	Ranges     []netip.Prefix   `json:"source_ranges,omitzero"` // of clients; missing: all; empty: there was no room for them
	Masquerade bool             `json:"masquerade,omitempty"`
	Drop       bool             `json:"drop,omitempty"`      // without backends, instead of refusing
	Lingering  []netip.AddrPort `json:"lingering,omitempty"` // backends that are left to the flows that have them
	Backends   []netip.AddrPort `json:"backends"`            // empty: connects are refused, or packets dropped
}

func dumpJSON(out io.Writer, frontends []lb.Change) error {
	all := make([]dumpedFrontend, len(frontends))
	for i, f := range frontends {
		all[i] = dumpedFrontend{
			f.Frontend.Address, f.Frontend.Protocol.String(), f.Frontend.Scope.String(), f.Affinity.Timeout.Seconds(),
			f.Ranges, f.Masquerade, f.Drop, f.Lingering, append([]netip.AddrPort{}, f.Backends...),
		}
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(all)
}
