// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"context"
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"golang.org/x/sys/unix"
)

// A hook asks for the sources of a namespace when it wants to know them, and from then on its processes are that client.
func TestSources(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		met, done := make(chan struct{}, 100), make(chan error)
		go func() { done <- b.OnStrangers(ctx, func() { met <- struct{}{} }) }()

		inside, elsewhere, sources := netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("10.8.0.0/16"), lb.Sources{IPv4: netip.MustParseAddr("10.9.8.7")}
		if netip.MustParseAddrPort(g.vip).Addr().Is6() {
			inside, elsewhere, sources = netip.MustParsePrefix("fd09::/16"), netip.MustParsePrefix("fd08::/16"), lb.Sources{IPv6: netip.MustParseAddr("fd09::7")}
		}
		sticky, guarded := to(tcp(g.vip), g.first, g.second, g.last), to(tcp(g.neighbour), g.first)
		sticky.Affinity = lb.Affinity{ID: 1, Timeout: time.Hour}
		guarded.Ranges = []netip.Prefix{inside}
		mustSync(t, b, sticky, guarded)

		// Where the address is not known, affinity goes by the namespace, and what goes by addresses is left to packets.
		first := pod.Connect(t, g.tcp, g.vip, 20)
		if len(first.Answers) != 1 || len(first.Errors) > 0 {
			t.Fatalf("want one backend to answer, got %+v", first)
		}
		wantErrors(t, pod.Connect(t, g.tcp, g.neighbour, 2), 2, unix.ENETUNREACH)
		select {
		case <-met:
		case <-time.After(10 * time.Second):
			t.Fatal("no hook asked for the namespace's sources")
		}

		if err := b.SetSources(cookieOf(t, pod), sources); err != nil {
			t.Fatal(err)
		}
		if then := pod.Connect(t, g.tcp, g.vip, 20); !maps.Equal(then.Answers, first.Answers) {
			t.Errorf("%v answer when the client's address is known, and before %v", then.Answers, first.Answers)
		}
		wantAnswers(t, pod.Connect(t, g.tcp, g.neighbour, 5), 5, g.first)
		guarded.Ranges = []netip.Prefix{elsewhere}
		mustSync(t, b, guarded)
		wantErrors(t, pod.Connect(t, g.tcp, g.neighbour, 2), 2, unix.ENETUNREACH)

		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// cookieOf is the cookie of a pod's network namespace.
func cookieOf(tb testing.TB, pod *lbtest.Pod) (cookie uint64) {
	tb.Helper()
	pod.Enter(tb, func() error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(socket)
		cookie, err = unix.GetsockoptUint64(socket, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	})
	return cookie
}
