// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// mustKeepLoop gives a node a way out, by which it chooses its address, and a loop.
func mustKeepLoop(tb testing.TB, l landscape) {
	tb.Helper()
	l.node.Enter(tb, func() error {
		out, err := netlink.LinkByName("outside")
		if err != nil {
			return err
		}
		// Where sources are checked at all devices, those of the loop are the node's own.
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0); err != nil {
			return err
		}
		everywhere := &net.IPNet{IP: make(net.IP, 4), Mask: net.CIDRMask(0, 32)}
		if netip.MustParseAddr(l.at.node).Is6() {
			everywhere = &net.IPNet{IP: make(net.IP, 16), Mask: net.CIDRMask(0, 128)}
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: out.Attrs().Index, Dst: everywhere, Scope: netlink.SCOPE_LINK})
	})
	if err := l.KeepLoop(); errors.Is(err, lb.ErrNotSupported) {
		tb.Skipf("skipped: %v", err)
	} else if err != nil {
		tb.Fatal(err)
	}
}

// What the node's own processes send goes to Services, too.
func TestPacketsOfTheNode(t *testing.T) {
	onPackets(t, func(t *testing.T, l landscape) {
		mustKeepLoop(t, l)
		first, second := l.at.backends()
		own := net.JoinHostPort(l.at.node, "8080")
		for _, network := range networks {
			l.node.Listen(t, network, own)
		}
		for _, network := range networks {
			t.Run(network, func(t *testing.T) {
				of := map[string]func(string) lb.Frontend{"tcp": tcp, "udp": udp, "sctp": sctp}[network]
				frontend, external := of(l.at.vip), of(l.at.external)
				ask := func(address string, n int) lbtest.Outcome {
					t.Helper()
					// As in TestPackets.
					l.node.Enter(t, func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
					return l.node.Connect(t, network, address, n)
				}
				t.Run("answered by all backends, which see the node", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, first, second), to(rest(l.at.vip)))
					got := ask(l.at.vip, 30)
					wantAnswers(t, got, 30, first, second)
					wantClient(t, got, l.at.node)
					wantPeer(t, got, l.at.vip)
				})
				t.Run("answered by the node itself", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend, own))
					got := ask(l.at.vip, 10)
					wantAnswers(t, got, 10, own)
					wantClient(t, got, l.at.node)
					wantPeer(t, got, l.at.vip)
				})
				t.Run("an address for the world outside, as one inside", func(t *testing.T) {
					mustSync(t, l.Balancer, to(external, first), to(outside(external), second))
					wantAnswers(t, ask(l.at.external, 10), 10, first)
					mustSync(t, l.Balancer, lb.Change{Frontend: external, Withdraw: true}, lb.Change{Frontend: outside(external), Withdraw: true})
				})
				t.Run("an address of the node", func(t *testing.T) {
					nodePort := of(net.JoinHostPort(l.at.node, "30080"))
					mustSync(t, l.Balancer, to(nodePort, first), to(outside(nodePort), second))
					got := ask(nodePort.Address.String(), 10)
					wantAnswers(t, got, 10, first)
					wantClient(t, got, l.at.node)
					mustSync(t, l.Balancer, to(nodePort, own), to(outside(nodePort), second))
					wantAnswers(t, ask(nodePort.Address.String(), 10), 10, own)
					mustSync(t, l.Balancer, lb.Change{Frontend: nodePort, Withdraw: true}, lb.Change{Frontend: outside(nodePort), Withdraw: true})
				})
				t.Run("refused without backends, and at no port of a Service", func(t *testing.T) {
					mustSync(t, l.Balancer, to(frontend))
					wantErrors(t, ask(l.at.vip, 1), 1, unix.ECONNREFUSED)
					wantErrors(t, ask(l.at.otherPort, 1), 1, unix.ECONNREFUSED)
				})
			})
		}
		t.Run("dropped", func(t *testing.T) {
			dropped := to(tcp(l.at.vip))
			dropped.Drop = true
			mustSync(t, l.Balancer, dropped)
			for _, address := range []string{l.at.vip, l.at.unallocated, l.at.external} {
				wantSilence(t, l.node.Pod, "tcp", address)
			}
		})
		t.Run("after somebody flushed all rules", func(t *testing.T) {
			if err := lb.RemoveNAT(l.node.NetNS()); err != nil {
				t.Fatal(err)
			}
			mustSync(t, l.Balancer, to(tcp(l.at.external), first), to(outside(tcp(l.at.external)), second))
			if err := errors.Join(l.KeepNAT(), l.KeepLoop()); err != nil {
				t.Fatal(err)
			}
			wantAnswers(t, l.node.Connect(t, "tcp", l.at.external, 5), 5, first)
		})
		t.Run("a flow lives on without the loop", func(t *testing.T) {
			mustSync(t, l.Balancer, to(udp(l.at.vip), first))
			l.node.Open(t, map[bool]string{true: "udp6", false: "udp4"}[netip.MustParseAddr(l.at.node).Is6()])
			wantAnswers(t, l.node.Exchange(t, l.at.vip, 1), 1, first)
			if err := lb.RemoveLoop(l.node.NetNS()); err != nil {
				t.Fatal(err)
			}
			wantAnswers(t, l.node.Exchange(t, l.at.vip, 1), 1, first)
		})
		t.Run("nothing is left", func(t *testing.T) {
			if err := lb.Cleanup("", l.node.NetNS()); err != nil {
				t.Fatal(err)
			}
			l.node.Enter(t, func() error {
				links, err := netlink.LinkList()
				for _, link := range links {
					if lb.IsLoop(link.Attrs().Name) {
						t.Errorf("%s is left", link.Attrs().Name)
					}
				}
				rules, failed := netlink.RuleList(netlink.FAMILY_ALL)
				for _, rule := range rules {
					if rule.Mark != 0 {
						t.Errorf("%v is left", rule)
					}
				}
				return errors.Join(err, failed)
			})
		})
	})
}
