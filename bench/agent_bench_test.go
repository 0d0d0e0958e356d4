// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/procfs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	proxyapis "k8s.io/kubernetes/pkg/proxy/apis"

	"github.com/plimsoll-bench/plimsoll/clusters"
	"github.com/plimsoll-bench/plimsoll/clusters/host"
	"github.com/plimsoll-bench/plimsoll/clusters/lab"
	"github.com/plimsoll-bench/plimsoll/dataplane"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/plimsoll-bench/plimsoll/scenarios/fleet"
)

const (
	// proxyMetrics is where all proxies serve metrics, as package dataplane expects them.
	proxyMetrics = "127.0.0.1:10249"
	// loadLimit is how long a proxy may take for its first sync, and answerLimit how long a Service may take to answer.
	loadLimit   = 10 * time.Minute
	answerLimit = 5 * time.Minute
	// addLimit is after how long no more Services are added: some proxies take many seconds for each.
	addLimit = 3 * time.Minute
	// endLimit is how long a proxy that is deep in the kernel, or in a large rule set, may take to die.
	endLimit = 15 * time.Minute
	// spares is how many Services there are to add.
	spares = 100
	// churnRate is how many endpoint changes a second are written.
	churnRate = 1_000
)

// Addresses of a node that is measured. The client's is one of those that package lab gives to pods, so that kube-proxy does not masquerade it.
const (
	figuresNode   = "10.0.0.1"
	figuresOther  = "10.0.0.2" // the node's too
	figuresClient = "198.18.0.10"
	figuresPort   = 8080
)

var figuresServices = netip.MustParsePrefix("198.19.0.0/16") // the lab's

// figuresProxies are the agent and what it is held against.
var figuresProxies = []struct {
	name string
	mode string // of package dataplane, which says how it is set up
	adds int    // Services to add, at most spares: as many as give a 99th percentile, or as there is patience for
}{
	{"agent", "ebpf", spares},
	{"iptables", "iptables", 15},
	{"iptables-legacy", "iptables-legacy", 15},
	{"nftables", "nftables", 15},
}

// BenchmarkAgent shows what the agent takes for many Services of two endpoints each, from a real API server, against real kube-proxy with the same
// Services: in iptables mode with both backends and in nftables mode. All have their own defaults. One runs at a time, on a node of its own; the API server
// and the Services are one for all. An operation is all of the following, and ns/op says nothing.
//
//   - cold-load-ms: the first sync, from when all has been listed to when maps or rules are written, as the proxy itself logs it. An error if it
//     takes more than ten minutes.
//   - added-p50-ms, added-p99-ms: from before the API write that gives the proxy one more Service, whose endpoint is there already, to the first
//     connect that is answered; added-samples is of how many, the 99th percentile of fewer than a hundred being the largest. write-p50-ms is what
//     the API server itself takes of that.
//   - rss-anon-MiB, rss-file-MiB, rss-maps-MiB: the proxy's memory at the end, with what it maps of BPF maps apart. What the kernel keeps of
//     rules is nobody's resident memory and is not counted.
//
// And of the agent alone, while endpoints change a thousand times a second and a client connects without a pause:
//
//   - churn/sec: the changes that were written; churn-cores: CPU time of the agent for each second of that.
//   - connects: how many were answered. One that fails is an error.
//   - churn-lag-ms: from before the write that follows the last change, of a Service that gets another endpoint, to the first connect that this
//     endpoint answers, and so how far the agent is behind at the end; idle-lag-ms is the median of the same when nothing else changes.
func BenchmarkAgent(b *testing.B) {
	for _, services := range []int{20_000, 50_000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			f := mustFigures(b, services)
			for _, p := range figuresProxies {
				b.Run("proxy="+p.name, func(b *testing.B) {
					mode, err := dataplane.Find(p.mode)
					if err != nil {
						b.Fatal(err)
					}
					if err := mode.Supported(b.Context()); errors.Is(err, clusters.ErrNotSupported) {
						b.Skipf("skipped: %v", err)
					} else if err != nil {
						b.Fatal(err)
					}
					for b.Loop() {
						f.measure(b, mode, p.adds)
					}
				})
			}
		})
	}
}

// figures are an API server with a fleet, for one proxy after the other.
type figures struct {
	bin        string
	run        *host.Run // of the proxies
	control    *lab.ControlPlane
	kubeconfig string
	api        kubernetes.Interface
	fleet      *fleet.Fleet
	spare      []netip.AddrPort // see mustMakeSpare
	// canary is the number of the fleet's last Service. Its endpoint is the node's own, and not one of those that churn.
	canary int
}

func mustFigures(b *testing.B, services int) *figures {
	b.Helper()
	f := &figures{bin: needsLab(b), canary: services - 1}
	if _, err := os.Stat(f.program()); err != nil {
		// Note: the test binary would do as well, but for its memory: its file pages are those of all tests too.
		b.Skip("needs plimsoll in bin/: make bin/plimsoll makes it")
	}
	f.control, f.kubeconfig = mustControlPlane(b, f.bin)
	var err error
	if f.api, err = kubernetes.NewForConfig(f.control.RESTConfig()); err != nil {
		b.Fatal(err)
	}
	for _, p := range figuresProxies {
		// kube-proxy waits for its Node and the Node's address.
		node := &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: p.mode}, Status: v1.NodeStatus{Addresses: []v1.NodeAddress{{Type: v1.NodeInternalIP, Address: figuresNode}}}}
		if _, err := f.api.CoreV1().Nodes().Create(b.Context(), node, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	f.fleet = mustFleet(b, f.control, f.api, services)
	f.mustSetCanary(b, figuresNode)
	f.spare = f.mustMakeSpare(b, spares)
	if f.run, err = host.New(fmt.Sprintf("test-figures-%d", os.Getpid()), b.TempDir()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), endLimit)
		defer cancel()
		if err := f.run.Close(ctx); err != nil {
			b.Error(err)
		}
	})
	return f
}

func (f *figures) program() string { return filepath.Join(f.bin, "plimsoll") }

func (f *figures) mustSetCanary(b *testing.B, address string) {
	b.Helper()
	if err := f.fleet.SetEndpoints(b.Context(), f.canary, netip.MustParseAddr(address)); err != nil {
		b.Fatal(err)
	}
}

// mustFleet writes Services of two endpoints into the API server's storage.
func mustFleet(b *testing.B, control *lab.ControlPlane, api kubernetes.Interface, services int) *fleet.Fleet {
	b.Helper()
	etcd, err := control.Etcd()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { etcd.Close() })
	f, err := fleet.New(b.Context(), api, etcd, lab.StoragePrefix, fleet.Plan{
		Namespace: "fleet", Endpoints: 2, Port: 80, TargetPort: figuresPort, Seed: 1, ServiceCIDR: figuresServices,
		EndpointPrefixes: []netip.Prefix{netip.MustParsePrefix("198.18.0.0/16"), netip.MustParsePrefix("198.17.0.0/16")},
	})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close() // its watches, which would take CPU while endpoints change
	if _, err := f.Scale(b.Context(), services, nil); err != nil {
		b.Fatal(err)
	}
	return f
}

// measure starts the mode's proxy on a new node, measures it, and ends it.
func (f *figures) measure(b *testing.B, mode dataplane.Mode, adds int) {
	node, site := f.mustNode(b, mode)
	client := node.AddPod(b, "client", figuresClient)
	proxy := f.mustStart(b, site, client)
	defer func() {
		f.end(b, proxy)
		for i := range adds { // as the next proxy expects them
			f.hide(b, spare(i), true)
		}
		f.mustSetCanary(b, figuresNode)
	}()

	ctx, cancel := context.WithTimeoutCause(b.Context(), loadLimit, fmt.Errorf("not within %v", loadLimit))
	defer cancel()
	var load time.Duration
	if err := host.Poll(ctx, mode.Name()+"'s first sync", func() (_ bool, err error) {
		if err := proxy.Err(); err != nil {
			b.Fatal(err)
		}
		load, err = firstSync(proxy.Log)
		return err == nil, err
	}); err != nil {
		b.Error(err)
		return
	}
	f.mustAnswer(b, client, f.fleet.Service(f.canary).Address, figuresNode)
	// Some proxies sync everything a second time when they have heard of their node; an added Service must not wait for that.
	if err := host.Poll(ctx, mode.Name()+" to have nothing queued", func() (bool, error) { return dataplane.NothingQueued(ctx, site) }); err != nil {
		b.Error(err)
		return
	}
	if n, err := mode.Programmed(b.Context(), site); err != nil {
		b.Fatal(err)
	} else if want := f.fleet.Len() + 1; n != want { // and the API server's own
		b.Errorf("%s has %d Services, want %d", mode.Name(), n, want)
	}
	b.ReportMetric(milliseconds(load), "cold-load-ms")

	f.add(b, client, adds)
	if site.spec.Agent {
		f.churn(b, client, proxy.PID())
	}
	reportMemory(b, proxy.PID())
}

// site is the node that a proxy runs on, as far as package dataplane reads it.
type site struct {
	clusters.Site // nil: nothing else is asked
	spec          clusters.ProxySpec
	ns            *clusters.NetNS
	dir           string
	iptables      string
}

func (s *site) Spec() clusters.ProxySpec    { return s.spec }
func (s *site) Enter(do func() error) error { return s.ns.Do(do) }
func (s *site) IPTables() string            { return s.iptables }
func (s *site) ProxyCgroup() string         { return "it has one" }
func (s *site) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return s.ns.DialContext(ctx, network, address)
}

// mustNode starts a node that reaches the API server, with a server at each of its addresses.
func (f *figures) mustNode(b *testing.B, mode dataplane.Mode) (*lbtest.Node, *site) {
	b.Helper()
	node := lbtest.StartNode(b, figuresNode)
	node.AddAddress(b, figuresOther)
	for _, address := range []string{figuresNode, figuresOther} {
		node.Listen(b, "tcp", server(address))
	}
	ns, err := clusters.NetNSOf(node.PID())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { ns.Close() })
	mustForward(b, f.control, ns)

	// What no rule translates the node takes for its own, and refuses at once: a packet that is lost is sent again a second later, and that second
	// would be measured.
	h, err := ns.Netlink()
	if err != nil {
		b.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		b.Fatal(err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: unix.RT_TABLE_LOCAL,
		Dst: &net.IPNet{IP: figuresServices.Addr().AsSlice(), Mask: net.CIDRMask(figuresServices.Bits(), 32)}}); err != nil {
		b.Fatal(err)
	}
	return node, &site{spec: mode.Spec(dataplane.Settings{ProxyDefaults: true}), ns: ns, dir: b.TempDir()}
}

// server is what a server at the address answers with.
func server(address string) string { return fmt.Sprintf("%s:%d", address, figuresPort) }

// mustStart starts the proxy of a site. The agent carries the client, and no other pod.
func (f *figures) mustStart(b *testing.B, s *site, client *lbtest.Pod) *host.Process {
	b.Helper()
	c := host.Command{Name: "agent", Argv: []string{f.program(), "agent", "-v", "2", "--kubeconfig", f.kubeconfig, "--cgroup", client.Cgroup,
		"--hostname-override", s.spec.Name, "--healthz-bind-address", agentHealth, "--metrics-bind-address", proxyMetrics}}
	var err error
	if !s.spec.Agent {
		if c, s.iptables, err = lab.KubeProxyCommand(s.spec, s.dir, f.bin, f.kubeconfig); err != nil {
			b.Fatal(err)
		}
	}
	c.NetNS, c.Log = s.ns, filepath.Join(s.dir, "log")
	if c.Cgroup, err = f.run.Cgroup.Child(s.spec.Name); err != nil {
		b.Fatal(err)
	}
	p, err := f.run.Start(c)
	if err != nil {
		b.Fatal(err)
	}
	return p
}

// end ends a proxy and the commands that it runs, so that the next has the machine to itself.
func (f *figures) end(b *testing.B, p *host.Process) {
	b.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), endLimit)
	defer cancel()
	if err := errors.Join(p.Close(ctx), p.Cgroup.Kill(ctx), p.Cgroup.Remove(ctx)); err != nil {
		b.Error(err)
	}
}

// firstSync is how long a proxy's log says that its first sync of IPv4 took, with all that it had listed.
func firstSync(log string) (time.Duration, error) {
	text, err := os.ReadFile(log)
	if err != nil {
		return 0, err
	}
	found := regexp.MustCompile(`"(?:Synced|SyncProxyRules complete)" ipFamily="IPv4".* elapsed="([^"]+)"`).FindSubmatch(text)
	if found == nil {
		return 0, errors.New("no sync in its log")
	}
	return time.ParseDuration(string(found[1]))
}

// mustAnswer returns when a connect to a Service is answered by the server at an address. Between attempts it pauses for a hundredth of the time
// that it has waited: attempts without a pause would take a slow proxy's CPU, and this adds no more than that hundredth to the figure.
func (f *figures) mustAnswer(b *testing.B, client *lbtest.Pod, service netip.AddrPort, address string) {
	b.Helper()
	for start := time.Now(); ; {
		got := client.Connect(b, "tcp", service.String(), 1)
		if got.Answers[server(address)] == 1 {
			return
		}
		waited := time.Since(start)
		if waited > answerLimit {
			b.Fatalf("%s is not answered by %s within %v, but: %+v", service, address, answerLimit, got)
		}
		<-time.After(waited / 100)
	}
}

// hide makes a spare Service one of another proxy than those that are measured, or one of theirs.
func (f *figures) hide(b *testing.B, service string, hidden bool) {
	b.Helper()
	value := "null"
	if hidden {
		value = `"nobody"`
	}
	patch := fmt.Sprintf(`{"metadata": {"labels": {%q: %s}}}`, proxyapis.LabelServiceProxyName, value)
	if _, err := f.api.CoreV1().Services("default").Patch(b.Context(), service, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		b.Fatal(err)
	}
}

// mustMakeSpare makes Services with an endpoint, which no proxy carries until they are shown, and returns their addresses.
//
// Creating a Service takes the API server the longer the more there are: whenever it gives an address away, chosen by itself or not, it counts
// all that are taken (createIPAddress in pkg/registry/core/service/ipallocator). At 50,000 Services that takes longer than all the rest, and is no
// proxy's doing. So they are created beforehand, for a proxy that does not exist, and the write that adds one takes that label away. All proxies
// watch by a selector, and what begins to match it is sent to them as a new Service.
//
// Note: asking for an address in the spec was tried. It spares the choice and not the count.
func (f *figures) mustMakeSpare(b *testing.B, n int) (addresses []netip.AddrPort) {
	b.Helper()
	for i := range n {
		name := spare(i)
		if _, err := f.api.DiscoveryV1().EndpointSlices("default").Create(b.Context(), newEndpointSlice(name, figuresNode), metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
		made, err := f.api.CoreV1().Services("default").Create(b.Context(), &v1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{proxyapis.LabelServiceProxyName: "nobody"}},
			Spec:       v1.ServiceSpec{Ports: []v1.ServicePort{{Port: 80}}},
		}, metav1.CreateOptions{})
		if err != nil {
			b.Fatal(err)
		}
		addresses = append(addresses, netip.AddrPortFrom(netip.MustParseAddr(made.Spec.ClusterIP), 80))
	}
	return addresses
}

func spare(i int) string { return fmt.Sprintf("spare-%d", i) }

// add shows spare Services, one after the other, and times each to the first connect that is answered.
func (f *figures) add(b *testing.B, client *lbtest.Pod, n int) {
	b.Helper()
	var added, writes []time.Duration
	begin := time.Now()
	for i := 0; i < n && time.Since(begin) < addLimit; i++ {
		start := time.Now()
		f.hide(b, spare(i), false)
		writes = append(writes, time.Since(start))
		f.mustAnswer(b, client, f.spare[i], figuresNode)
		added = append(added, time.Since(start))
	}
	b.ReportMetric(milliseconds(quantile(added, 0.5)), "added-p50-ms")
	b.ReportMetric(milliseconds(quantile(added, 0.99)), "added-p99-ms")
	b.ReportMetric(float64(len(added)), "added-samples")
	b.ReportMetric(milliseconds(quantile(writes, 0.5)), "write-p50-ms")
}

// newEndpointSlice is a slice of a Service with one ready endpoint.
func newEndpointSlice(service, address string) *discovery.EndpointSlice {
	name, port, ready := "", int32(figuresPort), true
	return &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discovery.LabelServiceName: service}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &port}},
		Endpoints:   []discovery.Endpoint{{Addresses: []string{address}, Conditions: discovery.EndpointConditions{Ready: &ready}}},
	}
}

// churn changes endpoints while a client connects to a Service whose endpoint stays.
func (f *figures) churn(b *testing.B, client *lbtest.Pod, agent int) {
	b.Helper()
	canary, other := f.fleet.Service(f.canary).Address, figuresOther
	flip := func() time.Duration {
		start := time.Now()
		f.mustSetCanary(b, other)
		f.mustAnswer(b, client, canary, other)
		elapsed := time.Since(start)
		other = map[string]string{figuresNode: figuresOther, figuresOther: figuresNode}[other]
		return elapsed
	}
	var idle []time.Duration
	for range 11 {
		idle = append(idle, flip())
	}
	b.ReportMetric(milliseconds(quantile(idle, 0.5)), "idle-lag-ms")

	stop := client.Hammer(b, "tcp", f.spare[0].String()) // which is shown
	before, start := cpuOf(b, agent), time.Now()
	changes := f.changeEndpoints(b)
	written := time.Since(start)
	// The API server sends changes in the order in which they were stored, and the agent takes them in that order: one that is stored after
	// all others is carried when all others are.
	lag := flip()
	cores := (cpuOf(b, agent) - before).Seconds() / time.Since(start).Seconds()
	got := stop()
	b.ReportMetric(float64(changes)/written.Seconds(), "churn/sec")
	b.ReportMetric(cores, "churn-cores")
	b.ReportMetric(milliseconds(lag), "churn-lag-ms")
	b.ReportMetric(float64(got.Answers[server(figuresNode)]), "connects")
	if len(got.Errors) > 0 {
		b.Errorf("connects failed: %v", got.Errors)
	}
}

// changeEndpoints writes ten changes to each of 2,000 Services from all over the fleet, or to each where it has fewer, at churnRate or as fast as it
// can below that, and returns how many these were. An endpoint of a Service goes, and comes again when all others have lost one: all have two in
// the end.
//
// They are written into the API server's storage, and its watches send them on. Note: writing them through the API, as controllers do, was tried,
// and took so much CPU that two processors managed 420 a second.
func (f *figures) changeEndpoints(b *testing.B) int {
	b.Helper()
	services := min(2_000, f.fleet.Len()-1)
	const rounds = 10 // even
	group, ctx := errgroup.WithContext(b.Context())
	group.SetLimit(64)
	start := time.Now()
	for n := range rounds * services {
		// Due times, as a ticker drops what a busy machine is late for.
		if early := time.Until(start.Add(time.Duration(n) * time.Second / churnRate)); early > 0 {
			<-time.After(early)
		}
		group.Go(func() error {
			i := n % services * ((f.fleet.Len() - 1) / services)
			var addresses []netip.Addr
			for _, backend := range f.fleet.Service(i).Backends {
				addresses = append(addresses, backend.Addr())
			}
			return f.fleet.SetEndpoints(ctx, i, addresses[:1+n/services%2]...)
		})
	}
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
	return rounds * services
}

// cpuOf is the CPU time that a process has used.
func cpuOf(b *testing.B, pid int) time.Duration {
	b.Helper()
	p, err := procfs.NewProc(pid)
	if err != nil {
		b.Fatal(err)
	}
	stat, err := p.Stat()
	if err != nil {
		b.Fatal(err)
	}
	return time.Duration(stat.CPUTime() * float64(time.Second))
}

// reportMemory tells what of the process is in memory, of three kinds. Subtle: the kernel counts pages of BPF maps with those of files, so that
// /proc/PID/status does not tell them apart.
func reportMemory(b *testing.B, pid int) {
	b.Helper()
	smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		b.Fatal(err)
	}
	kilobytes := map[string]int{"anon": 0, "file": 0, "maps": 0}
	var rss, anonymous int
	var name string
	for line := range strings.Lines(string(smaps)) {
		fields := strings.Fields(line)
		switch {
		case !strings.HasSuffix(fields[0], ":"): // the first line of a mapping: address, permissions, offset, device, inode, name
			name = strings.Join(fields[5:], " ")
		case fields[0] == "Rss:":
			fmt.Sscan(fields[1], &rss)
		case fields[0] == "Anonymous:": // follows Rss
			fmt.Sscan(fields[1], &anonymous)
			kilobytes["anon"] += anonymous
			if name == "anon_inode:bpf-map" {
				kilobytes["maps"] += rss - anonymous
			} else {
				kilobytes["file"] += rss - anonymous
			}
		}
	}
	for kind, n := range kilobytes {
		b.ReportMetric(float64(n)/1024, "rss-"+kind+"-MiB")
	}
}

func quantile(times []time.Duration, q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(times))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

func milliseconds(d time.Duration) float64 { return d.Seconds() * 1000 }
