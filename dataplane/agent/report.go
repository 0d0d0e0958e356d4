// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"time"

	"github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
	v1 "k8s.io/api/core/v1"
	"k8s.io/klog/v2"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
)

// Replacement says how far an agent does what kube-proxy would.
type Replacement string

// Full is all of it, Partial what is attached to, None nothing yet.
const (
	Full    Replacement = "True"
	Partial Replacement = "Partial"
	None    Replacement = "False"
)

// A Report is what an agent says of itself, at /status.
type Report struct {
	Replacement Replacement `json:"kubeProxyReplacement"`
	Reasons     []string    `json:"reasons"` // why it is not full; and what is to be looked at though it is
	Node        string      `json:"node"`
	Healthy     bool        `json:"healthy"`

	Cgroup           string   `json:"cgroup"`      // whose processes' sockets are translated; empty: none
	Hooks            []string `json:"socketHooks"` // programs attached there
	PeerNames        bool     `json:"peerNames"`   // whether getpeername(2) of TCP sockets names the Service
	Devices          []string `json:"devices"`     // whose packets are translated
	LocalMode        string   `json:"detectLocalMode,omitempty"`
	KubeProxysTraces []string `json:"kubeProxyRules"` // what of kube-proxy is still in the kernel

	OtherAgent string         `json:"otherAgentIn,omitempty"` // the network namespace, if another agent may be at work there
	Faults     []string       `json:"packetPathFaults"`       // what the packet path lacks now
	late       bool           // whether that does not explain why the agent is not healthy
	API        []APIReport    `json:"apiServer"` // by resource
	Families   []FamilyReport `json:"families"`
}

// A FamilyReport is that of an IP version.
type FamilyReport struct {
	Family    string    `json:"ipFamily"`
	Off       bool      `json:"off"`      // whether the node has none of it
	LastSync  time.Time `json:"lastSync"` // the last without an error; zero: none yet
	Failed    int       `json:"failedFrontends"`
	Contested int       `json:"contestedFrontends"`
	Ignored   int       `json:"ignoredAddresses"`
	Ports     Ports     `json:"servicePorts"`
	Services  Fill      `json:"servicesMap"`
	Backends  Fill      `json:"backendsMap"`
}

// Ports counts ports of Services by where they are served.
type Ports struct {
	ClusterIP    int `json:"clusterIP"`
	NodePort     int `json:"nodePort"`
	ExternalIP   int `json:"externalIP"`   // addresses
	LoadBalancer int `json:"loadBalancer"` // addresses
	Affinity     int `json:"sessionAffinity"`
}

// Fill is how full a map is.
type Fill struct {
	Entries  int `json:"entries"`
	Capacity int `json:"capacity"`
}

// A reporter knows where to look.
type reporter struct {
	cfg      Config
	balancer *lb.Balancer
	network  *network // nil without devices
	status   *status
	syncers  []*syncer
}

func (r *reporter) report() Report {
	report := Report{
		Node: r.cfg.NodeName, Healthy: r.status.now().Healthy, Cgroup: r.cfg.Cgroup, Hooks: r.balancer.Hooks(),
		PeerNames: r.cfg.LB.PeerNames, Devices: []string{}, LocalMode: string(r.cfg.Local.Mode), Reasons: []string{},
		Faults: append([]string{}, r.network.faults()...), API: r.status.api.report(), OtherAgent: r.status.taken,
	}
	report.late = !report.Healthy && !r.network.harmed()
	report.KubeProxysTraces = r.traces()
	if r.network != nil {
		r.network.do(func() { report.Devices = r.network.names() })
	}
	ipv4, ipv6 := r.balancer.Counts()
	for _, s := range r.syncers {
		counts := ipv4
		if s.family == v1.IPv6Protocol {
			counts = ipv6
		}
		family := s.report()
		family.Off = s.family == v1.IPv6Protocol && r.status.ipv6.isOff()
		family.Services = Fill{counts.Entries, counts.ServicesCapacity}
		family.Backends = Fill{counts.Slots, counts.BackendsCapacity}
		report.Families = append(report.Families, family)
	}
	report.judge()
	return report
}

// traces looks for kube-proxy's on a thread of its own: commands of iptables wait for each other.
func (r *reporter) traces() (traces []string) {
	if err := lb.InNetNS(r.cfg.NetNS, func() error { traces = kubeProxysTraces(); return nil }); err != nil {
		klog.V(2).InfoS("kube-proxy's rules not looked for", "err", err)
	}
	return traces
}

// judge says what the rest means.
func (r *Report) judge() {
	add := func(lesser Replacement, format string, args ...any) {
		r.Reasons = append(r.Reasons, fmt.Sprintf(format, args...))
		if r.Replacement != None {
			r.Replacement = lesser
		}
	}
	r.Replacement = Full
	if len(r.Hooks) == 0 {
		add(Partial, "sockets are left alone (--sockets=false): processes of the node itself reach no Services")
	}
	if len(r.Devices) == 0 {
		add(Partial, "no devices (--devices): nobody outside the cgroup reaches Services, and nothing from outside the node")
	}
	for _, f := range r.Families {
		if f.LastSync.IsZero() {
			add(None, "%s: nothing has been synced yet", f.Family)
		}
		if f.Off {
			r.Reasons = append(r.Reasons, fmt.Sprintf("%s: it is off on this node (net.ipv6.conf.*.disable_ipv6): nobody reaches its Services here before it is on", f.Family))
		}
		if f.Failed > 0 {
			add(Partial, "%s: %d frontends could not be programmed (see the log)", f.Family, f.Failed)
		}
		if f.Contested > 0 {
			r.Reasons = append(r.Reasons, fmt.Sprintf("%s: %d frontends are wanted by several Services, and the first by name has each", f.Family, f.Contested))
		}
		if f.Ignored > 0 {
			r.Reasons = append(r.Reasons, fmt.Sprintf("%s: %d addresses of Services cannot be served (see the log)", f.Family, f.Ignored))
		}
	}
	if r.OtherAgent != "" {
		r.Reasons = append(r.Reasons, "another agent may be at work in the network namespace: its lock was held at the start: "+r.OtherAgent)
	}
	for _, fault := range r.Faults {
		add(Partial, "packets: %s", fault)
	}
	if r.late {
		add(Partial, "syncs are late (see /healthz)")
	}
	for _, a := range r.API {
		if !a.AwaySince.IsZero() {
			r.Reasons = append(r.Reasons, fmt.Sprintf("%s: the API server is away, and what has changed since is not known: %s", a.Resource, a.LastError))
		}
	}
	for _, trace := range r.KubeProxysTraces {
		r.Reasons = append(r.Reasons, "kube-proxy's rules are still there: "+trace)
	}
}

// kubeProxysTraces names what kube-proxy has in the kernel, of any of its modes.
func kubeProxysTraces() []string {
	traces := []string{}
	if nft, err := nftables.New(); err == nil {
		tables, _ := nft.ListTables() // a kernel without nf_tables has none
		for _, table := range tables {
			family := map[nftables.TableFamily]string{nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6"}[table.Family]
			switch {
			case family != "" && table.Name == "kube-proxy":
				traces = append(traces, fmt.Sprintf("nftables: table %s kube-proxy", family))
			case family != "" && table.Name == "nat":
				if _, err := nft.ListChain(table, "KUBE-SERVICES"); err == nil {
					traces = append(traces, fmt.Sprintf("iptables-nft: table %s nat, chain KUBE-SERVICES", family))
				}
			}
		}
	}
	// The older tables can be read by their own command alone. Where that is not, nobody on the node's own file system has used it.
	for command, protocol := range map[string]iptables.Protocol{"iptables-legacy": iptables.ProtocolIPv4, "ip6tables-legacy": iptables.ProtocolIPv6} {
		path, err := exec.LookPath(command)
		if err != nil {
			continue
		}
		tables, err := iptables.New(iptables.IPFamily(protocol), iptables.Path(path))
		if err != nil {
			continue
		}
		if has, err := tables.ChainExists("nat", "KUBE-SERVICES"); err == nil && has {
			traces = append(traces, command+": chain KUBE-SERVICES")
		}
	}
	slices.Sort(traces)
	return traces
}

// handler answers with a report.
func (r *reporter) handler(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(r.report()); err != nil {
		klog.V(2).InfoS("Status not written", "err", err)
	}
}
