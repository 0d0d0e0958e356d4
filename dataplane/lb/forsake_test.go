// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// A connected UDP socket is ended once its backend is gone, and no other socket is.
func TestForsake(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{})
		forsake := func() {
			t.Helper()
			if err := b.Forsake(pod.NetNS()); errors.Is(err, lb.ErrNotSupported) {
				t.Skipf("skipped: %v", err)
			} else if err != nil {
				t.Fatal(err)
			}
		}
		mustSync(t, b, to(udp(g.vip), g.first))
		pod.Keep(t, g.udp, g.vip)
		wantAnswers(t, pod.AskKept(t), 1, g.first)
		mustSync(t, b, to(udp(g.vip), g.second, g.first))
		forsake()
		wantAnswers(t, pod.AskKept(t), 1, g.first)
		lingers := to(udp(g.vip), g.second)
		lingers.Lingering = []netip.AddrPort{netip.MustParseAddrPort(g.first)}
		mustSync(t, b, lingers)
		forsake()
		wantAnswers(t, pod.AskKept(t), 1, g.first)

		network := g.udp
		if network == "udp" && g.name == "IPv6" {
			network = "udp6"
		}
		pod.Open(t, network)
		wantAnswers(t, pod.Exchange(t, g.vip, 1), 1, g.second)
		mustSync(t, b, to(udp(g.vip), g.second))
		wantAnswers(t, pod.AskKept(t), 1, g.first) // sending alone asks nobody
		forsake()
		wantErrors(t, pod.AskKept(t), 1, unix.EDESTADDRREQ)
		wantAnswers(t, pod.Exchange(t, g.vip, 1), 1, g.second)

		// What somebody connects to the backend itself is his.
		pod.Keep(t, g.udp, g.first)
		forsake()
		wantAnswers(t, pod.AskKept(t), 1, g.first)

		pod.Keep(t, g.udp, g.vip)
		wantAnswers(t, pod.AskKept(t), 1, g.second)
		mustSync(t, b, lb.Change{Frontend: udp(g.vip), Withdraw: true})
		forsake()
		wantErrors(t, pod.AskKept(t), 1, unix.EDESTADDRREQ)
	})
}
