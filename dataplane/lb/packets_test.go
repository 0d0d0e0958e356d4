// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A landscape is a node whose packet programs are attached, with a client, two backends and a host outside the cluster behind it.
type landscape struct {
	*lb.Balancer
	node                            *lbtest.Node
	client, first, second, outsider *lbtest.Pod
	at                              territory
}

// A territory is the addresses of a landscape.
type territory struct {
	name                                  string
	node, client, first, second, outsider string
	insiders, clusterIPs                  string
	vip, otherVIP, otherPort, unallocated string
	external                              string
}

// backends are where those of a landscape listen.
func (at territory) backends() (first, second string) {
	return net.JoinHostPort(at.first, "8080"), net.JoinHostPort(at.second, "8080")
}

var territories = []territory{
	{
		"IPv4", "10.0.0.1", "10.1.0.1", "10.1.0.2", "10.1.0.3", "192.0.2.9", "10.1.0.0/16", "10.96.0.0/16",
		"10.96.0.10:80", "10.96.0.11:80", "10.96.0.10:81", "10.96.0.12:80",
		"203.0.113.1:80",
	},
	{
		"IPv6", "fd00::1", "fd01::1", "fd01::2", "fd01::3", "2001:db8::9", "fd01::/16", "fd96::/16",
		"[fd96::10]:80", "[fd96::11]:80", "[fd96::10]:81", "[fd96::12]:80",
		"[2001:db8::1]:80",
	},
}

// onPackets runs a test in a landscape of each IP version.
func onPackets(t *testing.T, test func(*testing.T, landscape)) {
	for _, at := range territories {
		t.Run(at.name, func(t *testing.T) {
			l := landscape{at: at, node: lbtest.StartNode(t, at.node)}
			l.client, l.outsider = l.node.AddPod(t, "client", at.client), l.node.AddPod(t, "outside", at.outsider)
			l.first, l.second = l.node.AddPod(t, "first", at.first), l.node.AddPod(t, "second", at.second)
			first, second := at.backends()
			for _, network := range networks {
				l.first.Listen(t, network, first)
				l.second.Listen(t, network, second)
			}
			l.Balancer = mustLoadPackets(t, l.node, lb.PacketOptions{KnowsInsiders: true})
			if err := errors.Join(l.SetInsiders([]netip.Prefix{netip.MustParsePrefix(at.insiders)}), l.SetClusterIPs([]netip.Prefix{netip.MustParsePrefix(at.clusterIPs)})); err != nil {
				t.Fatal(err)
			}
			test(t, l)
		})
	}
}

// mustLoadPackets loads a Balancer that is attached to all devices of a node but loopback, and to no cgroup.
func mustLoadPackets(tb testing.TB, node *lbtest.Node, options lb.PacketOptions) *lb.Balancer {
	tb.Helper()
	options.NetNS = node.NetNS()
	b, err := lb.Load(lb.Options{Packets: &options})
	if errors.Is(err, lb.ErrNotSupported) {
		tb.Skipf("skipped: %v", err)
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := b.Close(); err != nil {
			tb.Error(err)
		}
	})
	if err := b.KeepNAT(); err != nil {
		tb.Fatal(err)
	}
	node.Enter(tb, func() error {
		devices, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, d := range devices {
			if d.Flags&net.FlagLoopback != 0 {
				continue
			}
			if err := b.AttachDevice(lb.Device{Index: d.Index}); err != nil {
				return err
			}
		}
		return nil
	})
	return b
}

// wantClient fails the test unless servers saw this client alone.
func wantClient(tb testing.TB, got lbtest.Outcome, address string) {
	tb.Helper()
	if len(got.Clients) != 1 || got.Clients[address] == 0 {
		tb.Errorf("want the servers to see %v, got %+v", address, got)
	}
}

// wantSilence fails the test unless a pod gets nothing back from an address.
func wantSilence(tb testing.TB, pod *lbtest.Pod, network, address string) {
	tb.Helper()
	if got := pod.ConnectBriefly(tb, network, address); got.Errors[lbtest.TimedOut] != 1 {
		tb.Errorf("want no answer, got %+v", got)
	}
}

// networks are those that packets are translated of.
var networks = []string{"tcp", "udp", "sctp"}

func sctp(address string) lb.Frontend {
	return lb.Frontend{Address: netip.MustParseAddrPort(address), Protocol: lb.SCTP}
}

func outside(f lb.Frontend) lb.Frontend {
	f.Scope = lb.Outside
	return f
}

func rest(address string) lb.Frontend {
	return lb.Frontend{Address: netip.AddrPortFrom(netip.MustParseAddrPort(address).Addr(), 0), Scope: lb.Rest}
}

func TestPackets(t *testing.T) {
	onPackets(t, func(t *testing.T, l landscape) {
		first, second := l.at.backends()
		for _, network := range networks {
			t.Run(network, func(t *testing.T) {
				of := map[string]func(string) lb.Frontend{"tcp": tcp, "udp": udp, "sctp": sctp}[network]
				frontend, other := of(l.at.vip), of(l.at.otherVIP)
				ask := func(pod *lbtest.Pod, n int) lbtest.Outcome {
					t.Helper()
					// A UDP flow from a port that was used before would go on where that did; that is the agent's affair.
					l.node.Enter(t, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
					return pod.Connect(t, network, l.at.vip, n)
				}
				t.Run("a pod is answered by all backends, which see it", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, first, second), to(rest(l.at.vip)))
					got := ask(l.client, 50)
					wantAnswers(t, got, 50, first, second)
					wantClient(t, got, l.at.client)
					wantPeer(t, got, l.at.vip)
					if len(got.Answers) != 2 {
						t.Errorf("want answers of both, got %v", got.Answers)
					}
				})
				t.Run("who is outside has the node's address", func(t *testing.T) {
					got := ask(l.outsider, 20)
					wantAnswers(t, got, 20, first, second)
					wantClient(t, got, l.at.node)
				})
				t.Run("a pod reaches itself, and sees the node", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, first))
					got := ask(l.first, 5)
					wantAnswers(t, got, 5, first)
					wantClient(t, got, l.at.node)
				})
				t.Run("who is outside may have other backends", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, first), to(outside(frontend), second))
					wantAnswers(t, ask(l.client, 10), 10, first)
					got := ask(l.outsider, 10)
					wantAnswers(t, got, 10, second)
					wantClient(t, got, l.at.outsider)
				})
				t.Run("masquerade", func(t *testing.T) {
					masqueraded := to(outside(frontend), second)
					masqueraded.Masquerade = true
					mustSync(t, l.Balancer, masqueraded)
					wantClient(t, ask(l.outsider, 10), l.at.node)
				})
				t.Run("without backends packets are refused at once", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend), lb.Change{Frontend: outside(frontend), Withdraw: true})
					// ICMP is limited to some messages in a second.
					n := map[string]int{"tcp": 10, "udp": 1, "sctp": 1}[network]
					wantErrors(t, ask(l.client, n), n, unix.ECONNREFUSED)
					wantErrors(t, ask(l.outsider, n), n, unix.ECONNREFUSED)
				})
				t.Run("or dropped", func(t *testing.T) {
					dropped := to(frontend)
					dropped.Drop = true
					mustSync(t, l.Balancer, dropped)
					wantSilence(t, l.client, network, l.at.vip)
				})
				t.Run("ranges admit", func(t *testing.T) {
					ranged := to(frontend, first)
					ranged.Ranges = []netip.Prefix{netip.MustParsePrefix(l.at.insiders)}
					mustSync(t, l.Balancer, ranged)
					wantAnswers(t, ask(l.client, 5), 5, first)
					wantSilence(t, l.outsider, network, l.at.vip)
					host := netip.MustParseAddr(l.at.outsider)
					ranged.Ranges = []netip.Prefix{netip.PrefixFrom(host, host.BitLen())}
					mustSync(t, l.Balancer, ranged)
					wantSilence(t, l.client, network, l.at.vip)
					wantAnswers(t, ask(l.outsider, 5), 5, first)
					mustSync(t, l.Balancer, to(frontend, first))
					wantAnswers(t, ask(l.client, 5), 5, first)
				})
				t.Run("what is no port of a Service is refused, and dropped at no Service", func(t *testing.T) {
					wantErrors(t, l.client.Connect(t, network, l.at.otherPort, 1), 1, unix.ECONNREFUSED)
					wantSilence(t, l.client, network, l.at.unallocated)
				})
				t.Run("a client stays with its backend", func(t *testing.T) {
					c, o := to(frontend, first, second), to(other, second, first)
					c.Affinity = lb.Affinity{ID: 1, Timeout: 1 << 40}
					o.Affinity = c.Affinity
					mustSync(t, l.Balancer, c, o)
					got := ask(l.client, 20)
					if len(got.Answers) != 1 || len(got.Errors) > 0 {
						t.Fatalf("want one backend, got %+v", got)
					}
					chosen := slices.Collect(maps.Keys(got.Answers))
					wantAnswers(t, l.client.Connect(t, network, l.at.otherVIP, 20), 20, chosen...)
				})
				if network == "sctp" {
					return // what follows is the kernel's own NAT's to do
				}
				t.Run("from one port by two addresses to one backend", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, first), to(other, first))
					for range 3 {
						got := l.client.ConnectFrom(t, network, l.at.client, 5000, l.at.vip, l.at.otherVIP)
						wantAnswers(t, got, 2, first)
					}
				})
				if network == "udp" {
					return // an entry of a backend that is gone is the agent's affair
				}
				t.Run("from one port again and again", func(t *testing.T) {
					for _, backend := range []string{first, second, first} {
						mustSync(t, l.Balancer, to(frontend, backend))
						wantAnswers(t, l.client.ConnectFrom(t, network, l.at.client, 5001, l.at.vip), 1, backend)
					}
				})
			})
		}
	})
}

// Flows of UDP keep what they have: a backend that is the frontend's own address, the node's address though the first datagram is too large
// for the way, and life after the frontend is gone.
func TestPacketsOfAFlow(t *testing.T) {
	onPackets(t, func(t *testing.T, l landscape) {
		_, second := l.at.backends()
		network := map[bool]string{true: "udp6", false: "udp4"}[netip.MustParseAddr(l.at.node).Is6()]
		own := net.JoinHostPort(l.at.node, "8080")
		l.node.Listen(t, "udp", own)
		mustSync(t, l.Balancer, to(udp(own), own, second))
		for range 5 {
			l.client.Open(t, network)
			if got := l.client.Exchange(t, own, 10); len(got.Answers) != 1 || len(got.Errors) > 0 {
				t.Errorf("want one backend, got %+v", got)
			}
		}

		mustSync(t, l.Balancer, to(udp(l.at.vip), second), to(rest(l.at.vip)))
		l.node.Enter(t, func() error {
			device, err := netlink.LinkByName("second")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(device, 1400)
		})
		l.outsider.Open(t, network)
		if got := l.outsider.SendBriefly(t, l.at.vip, 1440); len(got.Answers) > 0 {
			t.Fatalf("want a datagram that is too large, got %+v", got)
		}
		got := l.outsider.Exchange(t, l.at.vip, 5)
		wantAnswers(t, got, 5, second)
		wantClient(t, got, l.at.node)

		l.client.Open(t, network)
		wantAnswers(t, l.client.Exchange(t, l.at.vip, 1), 1, second)
		mustSync(t, l.Balancer, lb.Change{Frontend: udp(l.at.vip), Withdraw: true})
		wantAnswers(t, l.client.Exchange(t, l.at.vip, 3), 3, second)
	})
}

// Addresses take no place from frontends.
func TestFullOfScopes(t *testing.T) {
	b, err := lb.Load(lb.Options{Services: 2})
	if errors.Is(err, lb.ErrNotSupported) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	first, second := "10.96.0.1:80", "10.96.0.2:80"
	mustSync(t, b, to(rest(first)), to(rest(second)), to(tcp(first)), to(outside(tcp(first))))
	wantFull(t, b.Sync([]lb.Change{to(tcp(second))}), tcp(second))
	mustSync(t, b, lb.Change{Frontend: outside(tcp(first)), Withdraw: true})
	mustSync(t, b, to(tcp(second)))
}

// What conntrack takes for invalid is dropped where conntrack was there before: the answer to a connect that was under way when it began
// would be invalid, too.
func TestInvalidIsDroppedLater(t *testing.T) {
	node := lbtest.StartNode(t, "10.0.0.1")
	b := mustLoadPackets(t, node, lb.PacketOptions{})
	if b.DropsInvalid() {
		t.Error("a table drops what is invalid as soon as it is there")
	}
	for range 2 {
		if err := b.KeepNAT(); err != nil {
			t.Fatal(err)
		}
		if !b.DropsInvalid() {
			t.Error("a table that was there does not drop what is invalid")
		}
	}
	if err := lb.RemoveNAT(node.NetNS()); err != nil {
		t.Fatal(err)
	}
	if err := b.KeepNAT(); err != nil {
		t.Fatal(err)
	}
	if b.DropsInvalid() {
		t.Error("a table that was removed is taken for one that was there")
	}
}
