// SPDX-License-Identifier: Apache-2.0

package agent_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	networking "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/plimsoll-bench/plimsoll/dataplane/agent"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// Addresses of a packet rig.
const (
	clientIP, outsiderIP = "10.1.0.1", "192.0.2.99"
	hereIP, thereIP      = "10.1.0.2", "10.2.0.2" // pods with an endpoint, on this node and another
	podCIDR              = "10.0.0.0/8"
	hereWeb, thereWeb    = hereIP + ":8080", thereIP + ":8080"

	nodeIP6, clientIP6, hereIP6 = "fd00:1::1", "fd00:2::1", "fd00:2::2" // which a rig is without until a test adds them
)

// A packetRig is an agent without socket hooks on a node with pods, one of which stands for another node's, and a host outside the
// cluster.
type packetRig struct {
	*rig
	node                  *lbtest.Node
	here, there, outsider *lbtest.Pod
}

// startPacketRig runs an agent over objects until the test ends.
func startPacketRig(t *testing.T, objects ...runtime.Object) *packetRig {
	t.Helper()
	r := newPacketRig(t, objects...)
	r.run(r.config())
	return r
}

// newPacketRig is a rig whose agent does not run yet.
func newPacketRig(t *testing.T, objects ...runtime.Object) *packetRig {
	t.Helper()
	cidr := &networking.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networking.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16"}}}
	r := &packetRig{rig: newRig(t, append(objects, cidr)...), node: lbtest.StartNode(t, nodeAddress)}
	r.pod = r.node.AddPod(t, "pod-client", clientIP)
	r.here, r.there, r.outsider = r.node.AddPod(t, "pod-here", hereIP), r.node.AddPod(t, "eth1", thereIP), r.node.AddPod(t, "eth0", outsiderIP)
	for _, network := range []string{"tcp", "udp", "sctp"} {
		r.here.Listen(t, network, hereWeb)
		r.there.Listen(t, network, thereWeb)
	}
	return r
}

// config is that of its agent.
func (r *packetRig) config() agent.Config {
	return agent.Config{
		Devices: []string{"*"}, NetNS: r.node.NetNS(),
		Local: agent.Local{Mode: agent.ClusterCIDR, CIDRs: []netip.Prefix{netip.MustParsePrefix(podCIDR)}},
	}
}

// itself is a rig whose connects come from the node, once its agent carries all of a Service at clusterIP: it gets a way out, by which it
// chooses its address, and where nobody answers.
func (r *packetRig) itself() *rig {
	r.Helper()
	r.wantsError("tcp", clusterIP+":81", unix.ECONNREFUSED)
	r.node.Enter(r.T, func() error { return byDevice("eth0", net.IPv4zero.To4()) })
	return r.from(r.node.Pod)
}

// from is a rig whose connects come from another pod.
func (r *packetRig) from(pod *lbtest.Pod) *rig {
	other := *r.rig
	other.pod = pod
	return &other
}

// seen wants servers to see a client by one address.
func seen(t *testing.T, pod *lbtest.Pod, address, client string) {
	t.Helper()
	got := pod.Connect(t, "tcp", address, 10)
	if !slices.Equal(slices.Collect(maps.Keys(got.Clients)), []string{client}) {
		t.Errorf("%s: want the endpoints to see %s, got %+v", address, client, got)
	}
}

// silent wants a pod to get no answer.
func silent(t *testing.T, pod *lbtest.Pod, address string) {
	t.Helper()
	if got := pod.ConnectBriefly(t, "tcp", address); got.Errors[lbtest.TimedOut] != 1 {
		t.Errorf("%s: want no answer, got %+v", address, got)
	}
}

// exposed is a Service at all kinds of addresses.
func exposed(change func(*v1.Service)) *v1.Service {
	http := port("http", v1.ProtocolTCP, 80)
	http.NodePort = 30080
	return service(func(s *v1.Service) {
		s.Spec.Type = v1.ServiceTypeLoadBalancer
		s.Spec.ExternalIPs = []string{externalIP}
		s.Status.LoadBalancer.Ingress = []v1.LoadBalancerIngress{{IP: ingressIP}}
		if change != nil {
			change(s)
		}
	}, http)
}

const externalIP, ingressIP = "192.0.2.1", "192.0.2.2"

// externals are the addresses of exposed for the world outside.
var externals = []string{externalIP + ":80", ingressIP + ":80", nodeAddress + ":30080"}

func TestPacketsReachServices(t *testing.T) {
	both := slice("web-1", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode), endpoint(thereIP, otherNode))
	r := startPacketRig(t, exposed(nil), both)
	outside := r.from(r.outsider)

	t.Run("ClusterIP", func(t *testing.T) {
		r.wants("tcp", http80, hereWeb, thereWeb)
		seen(t, r.pod, http80, clientIP)
		outside.wants("tcp", http80, hereWeb, thereWeb)
		seen(t, r.outsider, http80, nodeAddress)
		r.wantsError("tcp", clusterIP+":81", unix.ECONNREFUSED)
		silent(t, r.pod, "10.96.0.99:80")
	})
	t.Run("external addresses, cluster policy", func(t *testing.T) {
		for _, address := range externals {
			for _, pod := range []*lbtest.Pod{r.outsider, r.pod} {
				r.from(pod).wants("tcp", address, hereWeb, thereWeb)
				seen(t, pod, address, nodeAddress)
			}
		}
	})
	t.Run("external addresses, local policy", func(t *testing.T) {
		local := func(s *v1.Service) { s.Spec.ExternalTrafficPolicy = v1.ServiceExternalTrafficPolicyLocal }
		r.updateService(exposed(local))
		for _, address := range externals {
			outside.wants("tcp", address, hereWeb)
			seen(t, r.outsider, address, outsiderIP)
			r.wants("tcp", address, hereWeb, thereWeb)
			seen(t, r.pod, address, clientIP)
		}
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(thereIP, otherNode)))
		for _, address := range externals {
			r.wants("tcp", address, thereWeb)
			silent(t, r.outsider, address)
		}
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP))
		for _, address := range externals {
			outside.wantsError("tcp", address, unix.ECONNREFUSED)
			r.wantsError("tcp", address, unix.ECONNREFUSED)
		}
		r.updateSlice(both)
	})
	t.Run("internal policy", func(t *testing.T) {
		local := v1.ServiceInternalTrafficPolicyLocal
		r.updateService(exposed(func(s *v1.Service) { s.Spec.InternalTrafficPolicy = &local }))
		r.wants("tcp", http80, hereWeb)
		outside.wants("tcp", externals[0], hereWeb, thereWeb)
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(thereIP, otherNode)))
		outside.wants("tcp", externals[0], thereWeb)
		silent(t, r.pod, http80)
		r.updateSlice(both)
	})
	t.Run("source ranges", func(t *testing.T) {
		r.updateService(exposed(func(s *v1.Service) { s.Spec.LoadBalancerSourceRanges = []string{" 192.0.2.0/24 ", "fd00::/8"} }))
		outside.wants("tcp", http80, hereWeb, thereWeb)
		outside.wants("tcp", ingressIP+":80", hereWeb, thereWeb)
		silent(t, r.pod, ingressIP+":80")
		for _, address := range []string{externalIP + ":80", nodeAddress + ":30080"} {
			r.wants("tcp", address, hereWeb, thereWeb)
		}
		r.updateService(exposed(func(s *v1.Service) { s.Spec.LoadBalancerSourceRanges = []string{"192.0.2.0/24", "0.0.0.0/0"} }))
		r.wants("tcp", ingressIP+":80", hereWeb, thereWeb)
	})
	t.Run("hairpin", func(t *testing.T) {
		r.updateSlice(slice("web-1", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode)))
		r.from(r.here).wants("tcp", http80, hereWeb)
		seen(t, r.here, http80, nodeAddress)
	})
	t.Run("a Service that nobody outside is to reach any more", func(t *testing.T) {
		r.updateService(service(nil, port("http", v1.ProtocolTCP, 80)))
		r.wants("tcp", http80, hereWeb)
		outside.wantsError("tcp", externals[0], unix.ENETUNREACH)
		// The node itself answers at its own address, as it has nobody there.
		outside.wantsError("tcp", externals[2], unix.ECONNREFUSED)
	})
	t.Run("a device that comes", func(t *testing.T) {
		late := r.node.AddPod(t, "pod-late", "10.1.0.9")
		r.from(late).wants("tcp", http80, hereWeb)
	})
}

// An association of SCTP begins with an endpoint, whose port is another, and is refused without.
func TestPacketsOverSCTP(t *testing.T) {
	r := startPacketRig(t, service(nil, port("sig", v1.ProtocolSCTP, 80)), slice("web-1", "sig", v1.ProtocolSCTP, endpoint(hereIP, thisNode), endpoint(thereIP, otherNode)))
	clients := []*rig{r.rig, r.itself()}
	for _, from := range clients {
		from.wants("sctp", http80, hereWeb, thereWeb)
	}
	r.updateSlice(slice("web-1", "sig", v1.ProtocolSCTP, endpoint(thereIP, otherNode)))
	for _, from := range clients {
		from.wants("sctp", http80, thereWeb)
	}
	r.updateSlice(slice("web-1", "sig", v1.ProtocolSCTP))
	for _, from := range clients {
		from.wantsError("sctp", http80, unix.ECONNREFUSED)
	}
}

// A connection that its server has closed and its client has not is translated for as long as kube-proxy would have it: the client may send for
// an hour, not for the kernel's minute.
func TestPacketsOfAHalfClosedConnection(t *testing.T) {
	r := newPacketRig(t, exposed(nil), slice("web-1", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode)))
	cfg := r.config()
	cfg.Conntrack = agent.DefaultConntrack()
	cfg.Conntrack.MaxPerCore = 0 // which is the host's
	r.run(cfg)
	r.from(r.outsider).wants("tcp", nodeAddress+":30080", hereWeb)
	r.outsider.Hold(t, "tcp", nodeAddress+":30080", 1)
	var left []uint32 // of half closed connections, in seconds
	r.eventually(func() bool {
		left = nil
		r.node.Enter(t, func() error {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
			for _, f := range flows {
				if state, ok := f.ProtoInfo.(*netlink.ProtoInfoTCP); ok && state.State == nl.TCP_CONNTRACK_CLOSE_WAIT {
					left = append(left, f.TimeOut)
				}
			}
			return err
		})
		return len(left) == 1 && left[0] > 3540 && left[0] <= 3600
	}, func() string {
		return fmt.Sprintf("half closed connections are remembered for %d more seconds, want one for an hour", left)
	})
}

// The node's own processes reach Services while an agent is away, by the next one, and after somebody took the way from them. Where no
// packets are looked at any more, it is gone.
func TestPacketsOfTheNode(t *testing.T) {
	r := newPacketRig(t, exposed(nil), slice("web-1", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode), endpoint(thereIP, otherNode)))
	r.patience = 30 * time.Second // the kernel makes one change of devices at a time, and namespaces that end make many
	cfg := r.config()
	cfg.LB.PinDir = lbtest.MountBPF(t)
	end := r.run(cfg)
	node := r.itself()
	served := func() {
		t.Helper()
		for _, address := range append([]string{http80}, externals...) {
			node.wants("tcp", address, hereWeb, thereWeb)
			seen(t, r.node.Pod, address, nodeAddress)
		}
	}
	// loop is the index of the device by which it goes, or 0.
	loop := func() (index int) {
		r.node.Enter(t, func() error {
			if in, err := netlink.LinkByName("plimsoll1"); err == nil {
				index = in.Attrs().Index
			}
			return nil
		})
		return index
	}
	served()
	end()
	served()
	before := loop()
	end = r.run(cfg)
	served()
	if after := loop(); after != before || after == 0 {
		t.Errorf("want the next agent to go on with device %d, got %d", before, after)
	}
	r.node.Enter(t, func() error {
		out, err := netlink.LinkByName("plimsoll0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(out)
	})
	r.eventually(func() bool { return loop() > before }, func() string { return "the loop is not made anew" })
	served()
	end()
	cfg.Devices, cfg.Cgroup = nil, lbtest.NewCgroup(t)
	r.run(cfg)
	r.eventually(func() bool { return loop() == 0 }, func() string { return "the loop is left where no packets are looked at" })
}

// Where IPv6 is off that is said, IPv4 goes on, and what is of IPv6 is reached once it is on: from pods that come, and from the node itself.
func TestIPv6IsOff(t *testing.T) {
	const clusterIP6 = "fd00:96::10"
	dual := service(func(s *v1.Service) {
		s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, clusterIP6)
		s.Spec.IPFamilies = []v1.IPFamily{v1.IPv4Protocol, v1.IPv6Protocol}
	}, port("http", v1.ProtocolTCP, 80))
	slice6 := slice("web-6", "http", v1.ProtocolTCP, endpoint(hereIP6, thisNode))
	slice6.AddressType = discovery.AddressTypeIPv6
	cidr6 := &networking.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "six"}, Spec: networking.ServiceCIDRSpec{CIDRs: []string{"fd00:96::/112"}}}
	log := agent.StartLogs(t)
	r := newPacketRig(t, dual, cidr6, slice("web-4", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode)), slice6)
	r.patience = 30 * time.Second
	turn := func(off string) {
		t.Helper()
		r.node.Enter(t, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte(off), 0) })
	}
	turn("1")
	r.run(r.config())
	// says wants log, metrics, status and health to say whether it is off.
	says := func(off bool, line string) {
		t.Helper()
		metric := "\nplimsoll_lb_family_off{ip_family=\"IPv6\"} 0\n"
		if off {
			metric = strings.Replace(metric, "0", "1", 1)
		}
		var metrics string
		r.eventually(func() bool { _, metrics = r.get(r.metric, "/metrics"); return strings.Contains(metrics, metric) },
			func() string { return "want" + metric + "got\n" + metrics })
		if n := log.Count(line); n != 1 {
			t.Errorf("%q is said %d times: %s", line, n, log)
		}
		report := r.report()
		for _, family := range report.Families {
			if want := off && family.Family == string(v1.IPv6Protocol); family.Off != want {
				t.Errorf("status says of %s whether it is off: %v", family.Family, family.Off)
			}
		}
		if slices.ContainsFunc(report.Reasons, func(s string) bool { return strings.HasPrefix(s, "IPv6: it is off on this node") }) != off {
			t.Errorf("off: %v, and status gives these reasons: %q", off, report.Reasons)
		}
		r.healthy()
	}
	node := r.itself()
	says(true, "IPv6 is off on this node")
	for _, client := range []*rig{r.rig, node} {
		client.wants("tcp", http80, hereWeb)
	}

	turn("0")
	http6, here6 := net.JoinHostPort(clusterIP6, "80"), net.JoinHostPort(hereIP6, "8080")
	r.node.AddAddress(t, nodeIP6)
	r.here = r.node.AddPod(t, "pod-here6", hereIP6)
	r.here.Listen(t, "tcp", here6)
	client := r.node.AddPod(t, "pod-client6", clientIP6)
	r.node.Enter(t, func() error { return byDevice("eth0", net.IPv6zero) })
	says(false, "IPv6 is on again on this node")
	r.from(client).wants("tcp", http6, here6)
	node.wants("tcp", http6, here6)
	r.wants("tcp", http80, hereWeb)
}

// byDevice has packets to everywhere leave by a device.
func byDevice(device string, everywhere net.IP) error {
	out, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	to := &net.IPNet{IP: everywhere, Mask: net.CIDRMask(0, 8*len(everywhere))}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK})
}

// A flow of UDP goes to another endpoint when its own is gone.
func TestPacketsLeaveGoneEndpoints(t *testing.T) {
	r := startPacketRig(t, service(nil, port("dns", v1.ProtocolUDP, 53)), slice("web-1", "dns", v1.ProtocolUDP, endpoint(hereIP, thisNode)))
	dns := clusterIP + ":53"
	r.wants("udp", dns, hereWeb)
	r.pod.Open(t, "udp4")
	exchange := func(backend string) {
		t.Helper()
		r.eventually(func() bool { return r.pod.Exchange(t, dns, 1).Answers[backend] == 1 }, func() string { return "no answer of " + backend })
	}
	exchange(hereWeb)
	r.updateSlice(slice("web-1", "dns", v1.ProtocolUDP, endpoint(hereIP, thisNode), endpoint(thereIP, otherNode)))
	exchange(hereWeb)
	r.updateSlice(slice("web-1", "dns", v1.ProtocolUDP, endpoint(thereIP, otherNode)))
	exchange(thereWeb)
}

// A pod is one client at its sockets and by its packets: for session affinity and for source ranges.
func TestOneClientBothWays(t *testing.T) {
	sticky := exposed(func(s *v1.Service) {
		s.Spec.SessionAffinity = v1.ServiceAffinityClientIP
		s.Spec.LoadBalancerSourceRanges = []string{clientIP + "/32"}
	})
	r := newPacketRig(t, sticky)
	many := slice("web-1", "http", v1.ProtocolTCP)
	var addresses []string
	for i := range 16 {
		addresses = append(addresses, fmt.Sprint("10.1.1.", i+1))
		many.Endpoints = append(many.Endpoints, endpoint(addresses[i], thisNode))
	}
	endpoints := r.node.AddPod(t, "pod-many", addresses...)
	for _, address := range addresses {
		endpoints.Listen(t, "tcp", address+":8080")
	}
	r.create(many)
	cfg := r.config()
	cfg.Cgroup = r.pod.Cgroup
	r.run(cfg)

	// The test is not in the pod's cgroup.
	byPackets := func(address string) (server string) {
		r.pod.Enter(t, func() error {
			conn, err := net.DialTimeout("tcp", address, 3*time.Second)
			if err != nil {
				return err
			}
			defer conn.Close()
			answer, err := io.ReadAll(conn)
			server, _, _ = strings.Cut(string(answer), " ")
			return err
		})
		return server
	}
	// That a socket is connected to the endpoint shows by whom that sees, as packets to this address are masqueraded.
	addresses = []string{http80, ingressIP + ":80", externalIP + ":80"}
	for _, address := range addresses {
		r.eventually(func() bool {
			return r.pod.ConnectBriefly(t, "tcp", address).Clients[clientIP] == 1
		}, func() string { return "no socket was connected to an endpoint of " + address })
	}
	got := r.pod.Connect(t, "tcp", http80, 20)
	if len(got.Answers) != 1 || len(got.Errors) > 0 {
		t.Fatalf("at the socket: want one endpoint to answer, got %+v", got)
	}
	for _, address := range addresses {
		if server := byPackets(address); got.Answers[server] != 20 {
			t.Errorf("by packets %s answers at %s, and at the socket %v", server, address, got.Answers)
		}
	}
}

// Of a connection that was there before conntrack, its server may be the first that conntrack sees. When it has been reset, its client's port is
// as good as any other; others go on.
func TestPortOfAConnectionFromBefore(t *testing.T) {
	t.Run("IPv4", func(t *testing.T) {
		r := newPacketRig(t)
		testPortOfAConnectionFromBefore(t, r, r.pod, r.here, clientIP, hereIP)
	})
	t.Run("IPv6", func(t *testing.T) {
		r := newPacketRig(t)
		r.node.AddAddress(t, nodeIP6)
		testPortOfAConnectionFromBefore(t, r, r.node.AddPod(t, "pod-client6", clientIP6), r.node.AddPod(t, "pod-here6", hereIP6), clientIP6, hereIP6)
	})
}

func testPortOfAConnectionFromBefore(t *testing.T, r *packetRig, from, to *lbtest.Pod, clientAddress, serverAddress string) {
	log := agent.StartLogs(t)
	var listener net.Listener
	to.Enter(t, func() (err error) {
		listener, err = net.Listen("tcp", net.JoinHostPort(serverAddress, "0"))
		return err
	})
	defer listener.Close()
	connect := func(port int) (client, server net.Conn) {
		t.Helper()
		from.Enter(t, func() (err error) {
			dialer := net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientAddress), Port: port}}
			client, err = dialer.Dial("tcp", listener.Addr().String())
			return err
		})
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close(); server.Close() })
		return client, server
	}
	say := func(from, to net.Conn) {
		t.Helper()
		if err := to.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err := from.Write([]byte{'!'})
		if _, heard := to.Read(make([]byte, 1)); err != nil || heard != nil {
			t.Fatalf("say: %v, hear: %v", err, heard)
		}
	}

	reset, before := connect(20000)
	lasting, after := connect(20001)
	end := r.run(r.config())
	r.healthy()
	say(before, reset)
	say(after, lasting)
	say(lasting, after)
	if err := errors.Join(reset.(*net.TCPConn).SetLinger(0), reset.Close()); err != nil {
		t.Fatal(err)
	}
	end()
	r.run(r.config()) // which drops what is invalid, as the one before did not yet
	r.healthy()
	if line := "Connection tracking has forgotten connections that it met in their middle and that were reset\" connections=1"; log.Count(line) != 1 {
		t.Errorf("want %q once: %s", line, log)
	}
	client, server := connect(20000)
	say(server, client)
	say(client, server)
	if err := lasting.Close(); err != nil {
		t.Fatal(err)
	}
	if err := after.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := after.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a connection that was not reset: want its end, got %v", err)
	}
}

// An agent that looks at packets takes over from one that looked at sockets, and the other way round, and no client notices.
func TestFromSocketsToPacketsAndBack(t *testing.T) {
	r := newPacketRig(t, service(nil, port("http", v1.ProtocolTCP, 80)), slice("web-1", "http", v1.ProtocolTCP, endpoint(hereIP, thisNode)))
	packets, sockets := r.config(), agent.Config{Cgroup: r.pod.Cgroup}
	packets.LB.PinDir = lbtest.MountBPF(t)
	sockets.LB = packets.LB
	pinned := func(pattern string) bool {
		found, err := filepath.Glob(filepath.Join(packets.LB.PinDir, "v*", pattern))
		if err != nil {
			t.Fatal(err)
		}
		return len(found) > 0
	}
	end := r.run(sockets)
	r.wants("tcp", http80, hereWeb)
	stop := r.pod.Hammer(t, "tcp", http80)
	for _, cfg := range []agent.Config{packets, sockets, packets} {
		end()
		end = r.run(cfg)
		r.eventually(func() bool {
			return pinned("connect4") == (cfg.Cgroup != "") && pinned("ingress-*") == (len(cfg.Devices) > 0)
		}, func() string { return "the former agent's programs stay, or this one's do not come" })
		r.wants("tcp", http80, hereWeb)
	}
	if got := stop(); len(got.Errors) > 0 || got.Answers[hereWeb] == 0 {
		t.Errorf("meanwhile: %+v", got)
	}
}
