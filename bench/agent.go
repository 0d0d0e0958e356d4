// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// newAgentCommand is `plimsoll agent`: the embedded load balancer on a node, where kube-proxy would run.
func newAgentCommand() *cobra.Command {
	var kubeconfig string
	var verbosity int
	cfg := agent.Config{}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Carry the cluster's Services on this node with the embedded eBPF load balancer",
		Long: `Carry the cluster's Services on this node with the embedded eBPF load balancer, in kube-proxy's place.

Every process in the cgroup2 folder --cgroup and below it sees Services: a connect to one's address becomes a connect to
one of its endpoints. With --pin-dir that goes on when the agent ends, until the folder is deleted.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if os.Geteuid() != 0 {
				return errors.New("agent loads BPF programs: run it as root")
			}
			if err := setLogVerbosity(verbosity); err != nil {
				return err
			}
			if cfg.Cgroup, err = agentCgroup(cfg.Cgroup); err != nil {
				return err
			}
			if cfg.NodeName, err = agentNodeName(cfg.NodeName); err != nil {
				return err
			}
			if cfg.Client, err = agent.NewClient(kubeconfig); err != nil {
				return err
			}
			return agent.Run(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: the pod's service account")
	flags.StringVar(&cfg.NodeName, "hostname-override", "", "`name` of the Node object; empty: the host's name")
	flags.StringVar(&cfg.Cgroup, "cgroup", "", "cgroup2 `folder` whose processes see Services, never the root one; empty: in a container its own")
	flags.StringVar(&cfg.LB.PinDir, "pin-dir", "", "`folder` on a bpffs that keeps maps and link while no agent runs; empty: none")
	flags.DurationVar(&cfg.MinSyncPeriod, "min-sync-period", agent.DefaultMinSyncPeriod, "least time between two syncs")
	flags.StringVar(&cfg.HealthzBindAddress, "healthz-bind-address", agent.DefaultHealthzBindAddress, "`address:port` of /healthz and /livez; empty: none")
	flags.StringVar(&cfg.MetricsBindAddress, "metrics-bind-address", agent.DefaultMetricsBindAddress, "`address:port` of /metrics; empty: none")
	flags.IntVar(&cfg.LB.Services, "services-capacity", lb.DefaultServices, "most frontends (address, port, protocol) of each IP version at a time")
	flags.IntVar(&cfg.LB.Backends, "backends-capacity", lb.DefaultBackends, "most backends of each IP version, not counting those of IPv4 frontends with up to three, rounded up to a power of two")
	flags.IntVar(&cfg.LB.Affinities, "affinity-capacity", lb.DefaultAffinities, "clients that are remembered for Services with ClientIP affinity, each Service counted apart")
	flags.BoolVar(&cfg.LB.PeerNames, "peer-names", false, "have getpeername(2) name the Service on TCP sockets too, at a cost for each connect")
	flags.IntVarP(&verbosity, "v", "v", 0, "log verbosity, as kube-proxy's")
	return cmd
}

// agentCgroup is the cgroup that was asked for, or in a container the container's own. On a host none is taken for
// granted: its root cgroup holds every process there is.
func agentCgroup(asked string) (string, error) {
	if asked != "" {
		return asked, nil
	}
	mount, err := clusters.Cgroup2Mount()
	if err != nil {
		return "", err
	}
	// Only the root of the hierarchy lacks this file (Documentation/admin-guide/cgroup-v2.rst).
	if _, err := os.Stat(filepath.Join(mount, "cgroup.type")); err != nil {
		return "", fmt.Errorf("name the processes that shall see Services: --cgroup=%s/FOLDER", mount)
	}
	return mount, nil
}

// agentNodeName is the name that was asked for, or the host's in lower case, which kubelet gives a Node.
func agentNodeName(asked string) (string, error) {
	if asked != "" {
		return asked, nil
	}
	name, err := os.Hostname()
	return strings.ToLower(strings.TrimSpace(name)), err
}

// setLogVerbosity sets the level of klog, through which the Kubernetes libraries log to standard error.
func setLogVerbosity(level int) error {
	flags := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(flags)
	return flags.Set("v", strconv.Itoa(level))
}
