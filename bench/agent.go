// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
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
	var kubeconfig, localMode, bridge, prefix string
	var podCIDRs []string
	var sockets, cleanup bool
	var verbosity int
	cfg := agent.Config{Conntrack: agent.DefaultConntrack()}
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Carry the cluster's Services on this node with the embedded eBPF load balancer",
		Long: `Carry the cluster's Services on this node with the embedded eBPF load balancer, in kube-proxy's place.

Every process in the cgroup2 folder --cgroup and below it sees Services: a connect to one's address becomes a connect to
one of its endpoints. With --devices the packets that arrive there from anybody else are translated, too: those from
outside the node, of pods that are not in the cgroup, and by a loop of two devices those of the node's own processes
that are not. With --pin-dir all that goes on when the agent ends, until agent --cleanup.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if os.Geteuid() != 0 {
				return errors.New("agent loads BPF programs: run it as root")
			}
			if err := setLogVerbosity(verbosity); err != nil {
				return err
			}
			if cleanup {
				return agent.Cleanup(cfg)
			}
			if !sockets {
				cfg.Cgroup = ""
			} else if cfg.Cgroup, err = agentCgroup(cfg.Cgroup); err != nil {
				return err
			}
			if cfg.Local, err = agentLocal(localMode, podCIDRs, bridge, prefix); err != nil {
				return err
			}
			if cfg.NodeName, err = agentNodeName(cfg.NodeName); err != nil {
				return err
			}
			if cfg.Client, err = agent.NewClient(kubeconfig); err != nil {
				return err
			}
			if os.Getenv("GOGC") == "" {
				// Most of the heap is the cluster's Services, which live on: a little garbage beside them is plenty.
				debug.SetGCPercent(agentGarbage)
			}
			return agent.Run(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig `file`; empty: the pod's service account")
	flags.StringVar(&cfg.NodeName, "hostname-override", "", "`name` of the Node object; empty: the host's name")
	flags.StringVar(&cfg.Cgroup, "cgroup", "", "cgroup2 `folder` whose processes see Services, never the root one; empty: in a container its own")
	flags.BoolVar(&sockets, "sockets", true, "translate at the sockets of the cgroup's processes; false leaves all to the devices")
	flags.StringSliceVar(&cfg.Devices, "devices", nil, "`patterns` of names of devices whose packets are translated, as in 'eth*,veth*'; empty: none")
	flags.StringVar(&localMode, "detect-local-mode", "", "how clients inside the cluster are told from those outside, for packets: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix; empty: ClusterCIDR with --cluster-cidr, else not at all")
	flags.StringSliceVar(&podCIDRs, "cluster-cidr", nil, "`CIDRs` of the cluster's pods, for ClusterCIDR")
	flags.StringVar(&bridge, "pod-bridge-interface", "", "`name` of the pods' bridge, for BridgeInterface")
	flags.StringVar(&prefix, "pod-interface-name-prefix", "", "`prefix` of the names of the pods' devices, for InterfaceNamePrefix")
	flags.BoolVar(&cfg.MasqueradeAll, "masquerade-all", false, "have all endpoints see an address of the node instead of the client's, where packets are translated")
	flags.Int32Var(&cfg.Conntrack.MaxPerCore, "conntrack-max-per-core", cfg.Conntrack.MaxPerCore, "connections that are tracked for each CPU, where packets are translated; 0: as the node has it")
	flags.Int32Var(&cfg.Conntrack.Min, "conntrack-min", cfg.Conntrack.Min, "connections that are tracked at least, with --conntrack-max-per-core")
	flags.DurationVar(&cfg.Conntrack.TCPEstablished, "conntrack-tcp-timeout-established", cfg.Conntrack.TCPEstablished, "how long an established TCP connection is remembered over which nothing is sent; 0: as the node has it")
	flags.DurationVar(&cfg.Conntrack.TCPCloseWait, "conntrack-tcp-timeout-close-wait", cfg.Conntrack.TCPCloseWait, "how long a TCP connection is remembered that one side has closed; 0: as the node has it")
	flags.BoolVar(&cfg.Conntrack.TCPBeLiberal, "conntrack-tcp-be-liberal", false, "take packets out of a TCP connection's window for the connection's")
	flags.DurationVar(&cfg.Conntrack.UDP, "conntrack-udp-timeout", 0, "how long a UDP flow without answers is remembered; 0: as the node has it")
	flags.DurationVar(&cfg.Conntrack.UDPStream, "conntrack-udp-timeout-stream", 0, "how long a UDP flow with answers is remembered; 0: as the node has it")
	flags.StringVar(&cfg.LB.PinDir, "pin-dir", "", "`folder` on a bpffs that keeps maps and link while no agent runs; empty: none")
	flags.StringVar(&cfg.Snapshot, "snapshot", "", "`file` from which Services are served after a reboot until the API server answers; empty: none")
	flags.BoolVar(&cleanup, "cleanup", false, "remove all that agents left on this node, by --pin-dir and --snapshot and in nftables, and end")
	flags.DurationVar(&cfg.MinSyncPeriod, "min-sync-period", agent.DefaultMinSyncPeriod, "least time between two syncs")
	flags.StringVar(&cfg.HealthzBindAddress, "healthz-bind-address", agent.DefaultHealthzBindAddress, "`address:port` of /healthz and /livez; empty: none")
	flags.StringVar(&cfg.MetricsBindAddress, "metrics-bind-address", agent.DefaultMetricsBindAddress, "`address:port` of /metrics; empty: none")
	flags.BoolVar(&cfg.Profiling, "profiling", false, "serve /debug/pprof at the metrics address")
	flags.IntVar(&cfg.LB.Services, "services-capacity", lb.DefaultServices, "most frontends (address, port, protocol) of each IP version at a time; those that clients outside the cluster see otherwise count twice")
	flags.IntVar(&cfg.LB.Backends, "backends-capacity", lb.DefaultBackends, "most backends of each IP version, not counting those of IPv4 frontends with up to three, rounded up to a power of two")
	flags.IntVar(&cfg.LB.Affinities, "affinity-capacity", lb.DefaultAffinities, "clients that are remembered for Services with ClientIP affinity, each Service counted apart")
	flags.BoolVar(&cfg.LB.PeerNames, "peer-names", false, "have getpeername(2) name the Service on TCP sockets too, at a cost for each connect and close, and 4 MiB")
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

// agentGarbage is how much garbage the agent's heap may hold, in percent of what lives.
const agentGarbage = 10

// agentLocal is how clients inside the cluster are known, by flags with the names and meanings of kube-proxy's.
func agentLocal(mode string, podCIDRs []string, bridge, prefix string) (agent.Local, error) {
	local := agent.Local{Mode: agent.LocalMode(mode), Interface: bridge}
	if local.Mode == agent.NoLocalMode && len(podCIDRs) > 0 {
		local.Mode = agent.ClusterCIDR
	}
	if local.Mode == agent.InterfaceNamePrefix {
		local.Interface = prefix
	}
	for _, text := range podCIDRs {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return local, fmt.Errorf("--cluster-cidr: %w", err)
		}
		local.CIDRs = append(local.CIDRs, p)
	}
	return local, nil
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
