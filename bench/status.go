// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
)

// newStatusCommand is `plimsoll status`: what an agent on this node says of itself.
func newStatusCommand() *cobra.Command {
	var address, format string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "say how far the agent on this node does what kube-proxy would, and by what",
		Long: `Status asks the agent on this node, at the address of its metrics, what it is attached to, what it carries, how full its
maps are and whether something of kube-proxy is still there. It ends with an error unless an agent answers that has synced.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			write, ok := statusFormats[format]
			if !ok {
				return fmt.Errorf("--output %q: want text or json", format)
			}
			report, err := askStatus(cmd.Context(), address)
			if err != nil {
				return fmt.Errorf("KubeProxyReplacement: %s: no agent answers at %s: %w", agent.None, address, err)
			}
			if err := write(cmd.OutOrStdout(), report); err != nil {
				return err
			}
			if report.Replacement == agent.None {
				return fmt.Errorf("the agent carries nothing yet")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&address, "address", agent.DefaultMetricsBindAddress, "the agent's --metrics-bind-address, `address:port`")
	cmd.Flags().StringVarP(&format, "output", "o", "text", "text or json")
	return cmd
}

var statusFormats = map[string]func(io.Writer, agent.Report) error{"text": statusText, "json": statusJSON}

func askStatus(ctx context.Context, address string) (report agent.Report, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/status", nil)
	if err != nil {
		return report, err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return report, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return report, fmt.Errorf("it answers %s: is it kube-proxy's?", answer.Status)
	}
	return report, json.NewDecoder(answer.Body).Decode(&report)
}

func statusJSON(out io.Writer, report agent.Report) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(report)
}

func statusText(out io.Writer, r agent.Report) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(w, name+":\t"+format+"\n", args...) }
	line("KubeProxyReplacement", "%s", r.Replacement)
	for _, reason := range r.Reasons {
		line("  note", "%s", reason)
	}
	line("Node", "%s", r.Node)
	line("Healthy", "%t", r.Healthy)
	if len(r.Hooks) > 0 {
		line("Socket LB", "%s at %s", strings.Join(r.Hooks, " "), r.Cgroup)
		line("  peer names of TCP", "%t", r.PeerNames)
	} else {
		line("Socket LB", "off")
	}
	if len(r.Devices) > 0 {
		line("Packets", "tcx ingress at %s", strings.Join(r.Devices, " "))
		mode := r.LocalMode
		if mode == "" {
			mode = "none: all clients are outside the cluster"
		}
		line("  local mode", "%s", mode)
	} else {
		line("Packets", "off")
	}
	away := false
	var heard time.Time // of the resource that was heard of longest ago
	for i, a := range r.API {
		if !a.AwaySince.IsZero() {
			line("API server", "away since %s for %s; last error: %s", a.AwaySince.Format(time.RFC3339), a.Resource, a.LastError)
			away = true
		}
		if i == 0 || a.LastHeard.Before(heard) {
			heard = a.LastHeard
		}
	}
	switch {
	case away:
	case heard.IsZero():
		line("API server", "has not answered yet")
	default:
		line("API server", "answers; last heard %s", heard.Format(time.RFC3339))
	}
	for _, f := range r.Families {
		synced := "never"
		if !f.LastSync.IsZero() {
			synced = f.LastSync.Format(time.RFC3339)
		}
		line(f.Family, "last synced %s", synced)
		p := f.Ports
		line("  service ports", "%d ClusterIP, %d NodePort, %d external IP, %d load balancer, %d with session affinity", p.ClusterIP, p.NodePort, p.ExternalIP, p.LoadBalancer, p.Affinity)
		line("  services map", "%d of %d", f.Services.Entries, f.Services.Capacity)
		line("  backends map", "%d of %d", f.Backends.Entries, f.Backends.Capacity)
	}
	rules := "none"
	if len(r.KubeProxysTraces) > 0 {
		rules = strings.Join(r.KubeProxysTraces, ", ")
	}
	line("kube-proxy's rules", "%s", rules)
	return w.Flush()
}
