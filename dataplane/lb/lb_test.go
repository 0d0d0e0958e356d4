// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lbtest.Main(m) }

// mustLoad loads a Balancer that is attached to the pod's cgroup until the test ends.
func mustLoad(tb testing.TB, pod *lbtest.Pod, options lb.Options) *lb.Balancer {
	tb.Helper()
	b, err := lb.Load(options)
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
	if err := b.Attach(pod.Cgroup); err != nil {
		tb.Fatal(err)
	}
	return b
}

func mustSync(tb testing.TB, b *lb.Balancer, changes ...lb.Change) {
	tb.Helper()
	if err := b.Sync(changes); err != nil {
		tb.Fatal(err)
	}
}

func tcp(address string) lb.Frontend {
	return lb.Frontend{Address: netip.MustParseAddrPort(address), Protocol: lb.TCP}
}

func udp(address string) lb.Frontend {
	return lb.Frontend{Address: netip.MustParseAddrPort(address), Protocol: lb.UDP}
}

func to(frontend lb.Frontend, backends ...string) lb.Change {
	c := lb.Change{Frontend: frontend}
	for _, b := range backends {
		c.Backends = append(c.Backends, netip.MustParseAddrPort(b))
	}
	return c
}

// wantAnswers fails the test unless all n connects were answered by one of backends.
func wantAnswers(tb testing.TB, got lbtest.Outcome, n int, backends ...string) {
	tb.Helper()
	answered := 0
	for _, backend := range backends {
		answered += got.Answers[backend]
	}
	if answered != n || len(got.Errors) > 0 {
		tb.Errorf("%d connects: want them answered by %v, got %+v", n, backends, got)
	}
}

func wantErrors(tb testing.TB, got lbtest.Outcome, n int, number unix.Errno) {
	tb.Helper()
	if got.Errors[number.Error()] != n || len(got.Answers) > 0 {
		tb.Errorf("%d connects: want %q from each, got %+v", n, number, got)
	}
}

const vip = "10.96.0.10:80"

// A ground is what the same tests are made on for each IP version.
type ground struct {
	name                string
	tcp, udp            string // networks of clients
	vip, neighbour      string
	otherPort           string // of vip
	first, second, last string // backends' addresses
}

var grounds = []ground{
	{"IPv4", "tcp", "udp", vip, "10.96.0.11:80", "10.96.0.10:81", "127.0.0.1:8080", "127.0.0.2:8081", "127.0.0.3:8080"},
	{"IPv6", "tcp", "udp", "[fd00:96::10]:80", "[fd00:96::11]:80", "[fd00:96::10]:81", "[fd00::1]:8080", "[fd00::2]:8081", "[fd00::3]:8080"},
	{"IPv4 mapped into IPv6", "tcp6", "udp6", vip, "10.96.0.11:80", "10.96.0.10:81", "127.0.0.1:8080", "127.0.0.2:8081", "127.0.0.3:8080"},
}

// onEach runs a test on each ground, with a pod whose backends listen.
func onEach(t *testing.T, test func(*testing.T, *lbtest.Pod, ground)) {
	for _, g := range grounds {
		t.Run(g.name, func(t *testing.T) {
			pod := lbtest.StartPod(t)
			for _, address := range []string{g.first, g.second, g.last} {
				if a := netip.MustParseAddrPort(address).Addr(); a.Is6() {
					pod.AddAddress(t, a.String()+"/128")
				}
				pod.Listen(t, "tcp", address)
				pod.Listen(t, "udp", address)
			}
			test(t, pod, g)
		})
	}
}

func TestConnect(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{})

		t.Run("an unknown address is untouched", func(t *testing.T) {
			wantAnswers(t, pod.Connect(t, g.tcp, g.first, 1), 1, g.first)
			wantErrors(t, pod.Connect(t, g.tcp, g.vip, 1), 1, unix.ENETUNREACH)
		})
		t.Run("a TCP frontend is answered by its backends", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip), g.first, g.second))
			wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 50), 50, g.first, g.second)
		})
		t.Run("UDP at the same address and port is another frontend", func(t *testing.T) {
			wantErrors(t, pod.Connect(t, g.udp, g.vip, 1), 1, unix.ENETUNREACH)
			mustSync(t, b, to(udp(g.vip), g.second))
			wantAnswers(t, pod.Connect(t, g.udp, g.vip, 20), 20, g.second)
		})
		t.Run("another port is not", func(t *testing.T) {
			wantErrors(t, pod.Connect(t, g.tcp, g.otherPort, 1), 1, unix.ENETUNREACH)
		})
		t.Run("a change of backends moves the next connect", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip), g.second))
			wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 50), 50, g.second)
		})
		t.Run("many backends all answer", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip), g.first, g.second, g.last, g.first, g.second))
			got := pod.Connect(t, g.tcp, g.vip, 100)
			wantAnswers(t, got, 100, g.first, g.second, g.last)
			if len(got.Answers) != 3 {
				t.Errorf("want answers of three backends, got %v", got.Answers)
			}
		})
		t.Run("no backends refuse at once", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip)), to(udp(g.vip)))
			wantErrors(t, pod.Connect(t, g.tcp, g.vip, 3), 3, unix.ECONNREFUSED)
			wantErrors(t, pod.Connect(t, g.udp, g.vip, 3), 3, unix.ECONNREFUSED)
		})
		t.Run("backends come back", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip), g.first))
			wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 3), 3, g.first)
		})
		t.Run("a withdrawn frontend is not translated", func(t *testing.T) {
			mustSync(t, b, lb.Change{Frontend: tcp(g.vip), Withdraw: true}, lb.Change{Frontend: udp(g.vip), Withdraw: true})
			wantErrors(t, pod.Connect(t, g.tcp, g.vip, 1), 1, unix.ENETUNREACH)
			mustSync(t, b, lb.Change{Frontend: tcp(g.vip), Withdraw: true})
		})
		t.Run("detaching ends translation", func(t *testing.T) {
			mustSync(t, b, to(tcp(g.vip), g.first))
			if err := b.Detach(); err != nil {
				t.Fatal(err)
			}
			wantErrors(t, pod.Connect(t, g.tcp, g.vip, 1), 1, unix.ENETUNREACH)
			if err := b.Attach(pod.Cgroup); err != nil {
				t.Fatal(err)
			}
			wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 1), 1, g.first)
		})
	})
}

// An unconnected UDP socket is answered from the frontend's address, by one backend for as long as the frontend has it.
func TestUnconnected(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{})
		network := g.udp
		if netip.MustParseAddrPort(g.vip).Addr().Is6() {
			network = "udp6"
		}
		pod.Open(t, network)
		mustSync(t, b, to(udp(g.vip), g.first, g.second), to(udp(g.neighbour), g.last))
		got := pod.Exchange(t, g.vip, 20)
		wantAnswers(t, got, 20, g.first, g.second)
		wantPeer(t, got, g.vip)
		if len(got.Answers) != 1 {
			t.Fatalf("want one backend to answer, got %v", got.Answers)
		}
		chosen := slices.Collect(maps.Keys(got.Answers))[0]

		mustSync(t, b, to(udp(g.vip), g.last, g.last, chosen, g.last, g.last))
		wantAnswers(t, pod.Exchange(t, g.vip, 10), 10, chosen)
		mustSync(t, b, to(udp(g.vip), g.last, chosen))
		wantAnswers(t, pod.Exchange(t, g.vip, 10), 10, chosen)
		got = pod.Exchange(t, g.neighbour, 5)
		wantAnswers(t, got, 5, g.last)
		wantPeer(t, got, g.neighbour)
		wantPeer(t, pod.Exchange(t, g.vip, 5), g.vip)

		// It gets no new flows, but those that go there stay.
		lingers := to(udp(g.vip), g.last)
		lingers.Lingering = []netip.AddrPort{netip.MustParseAddrPort(chosen)}
		mustSync(t, b, lingers)
		wantAnswers(t, pod.Exchange(t, g.vip, 10), 10, chosen)
		wantAnswers(t, pod.Connect(t, g.udp, g.vip, 10), 10, g.last)
		mustSync(t, b, to(udp(g.vip), g.last))
		got = pod.Exchange(t, g.vip, 10)
		wantAnswers(t, got, 10, g.last)
		wantPeer(t, got, g.vip)
		// As in a rolling update with nothing sent meanwhile: what stands in the maps is where it was, with another backend.
		mustSync(t, b, to(udp(g.vip), g.last, g.first))
		mustSync(t, b, to(udp(g.vip), g.first))
		wantAnswers(t, pod.Exchange(t, g.vip, 10), 10, g.first)
		mustSync(t, b, to(udp(g.vip)))
		mustSync(t, b, to(udp(g.vip), g.second))
		wantAnswers(t, pod.Exchange(t, g.vip, 10), 10, g.second)
		mustSync(t, b, to(udp(g.vip)))
		wantErrors(t, pod.Exchange(t, g.vip, 2), 2, unix.ECONNREFUSED)
		mustSync(t, b, lb.Change{Frontend: udp(g.vip), Withdraw: true})
		wantErrors(t, pod.Exchange(t, g.vip, 2), 2, unix.ENETUNREACH)
		got = pod.Exchange(t, g.first, 2)
		wantAnswers(t, got, 2, g.first)
		wantPeer(t, got, g.first)
	})
}

// A socket that talks to more frontends than it can remember is still answered from each.
func TestUnconnectedToMany(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "udp", "127.0.0.1:8080")
	b := mustLoad(t, pod, lb.Options{})
	pod.Open(t, "udp4")
	for round := range 2 {
		for i := range 20 {
			frontend := udp(fmt.Sprintf("10.96.0.%d:53", i+1))
			if round == 0 {
				mustSync(t, b, to(frontend, "127.0.0.1:8080"))
			}
			got := pod.Exchange(t, frontend.Address.String(), 1)
			wantAnswers(t, got, 1, "127.0.0.1:8080")
			wantPeer(t, got, frontend.Address.String())
		}
	}
}

// getpeername(2) names the frontend on UDP sockets, and on TCP sockets if it is asked for.
func TestPeerNames(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		for _, names := range []bool{false, true} {
			b := mustLoad(t, pod, lb.Options{PeerNames: names})
			mustSync(t, b, to(tcp(g.vip), g.first), to(udp(g.vip), g.first))
			peer := g.first
			if names {
				peer = g.vip
			}
			wantPeer(t, pod.Connect(t, g.tcp, g.vip, 3), peer)
			wantPeer(t, pod.Connect(t, g.udp, g.vip, 3), g.vip)
			wantPeer(t, pod.Connect(t, g.tcp, g.first, 3), g.first)
			wantPeer(t, pod.Connect(t, g.udp, g.first, 3), g.first)
			if err := b.Detach(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// wantPeer fails the test unless all answers seem to come from one address.
func wantPeer(tb testing.TB, got lbtest.Outcome, address string) {
	tb.Helper()
	if len(got.Peers) != 1 || got.Peers[address] == 0 || len(got.Errors) > 0 {
		tb.Errorf("want the peer %v, got %+v", address, got)
	}
}

// A client keeps its backend at all frontends that share an affinity, while the backend is there and the timeout has not passed.
func TestAffinity(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{})
		keep := func(frontend lb.Frontend, affinity lb.Affinity, backends ...string) lb.Change {
			c := to(frontend, backends...)
			c.Affinity = affinity
			return c
		}
		chosen := func(address string) string {
			t.Helper()
			got := pod.Connect(t, g.tcp, address, 20)
			if len(got.Answers) != 1 || len(got.Errors) > 0 {
				t.Fatalf("%s: want one backend to answer, got %+v", address, got)
			}
			return slices.Collect(maps.Keys(got.Answers))[0]
		}
		day := lb.Affinity{ID: 1, Timeout: 24 * time.Hour}
		others := []string{g.second, g.first, g.last}
		// Once from backends in the entry, once from none.
		mustSync(t, b, to(tcp(g.vip), g.first, g.second), to(tcp(g.otherPort), g.first, g.second, g.last))
		mustSync(t, b, keep(tcp(g.vip), day, g.first, g.second, g.last), keep(tcp(g.neighbour), day, others...))
		first := chosen(g.vip)
		if got := chosen(g.neighbour); got != first {
			t.Errorf("another frontend of the affinity is answered by %s, want %s", got, first)
		}
		wantAnswers(t, pod.Connect(t, g.tcp, g.otherPort, 50), 50, others...)
		mustSync(t, b, keep(tcp(g.vip), day, others...))
		if got := chosen(g.vip); got != first {
			t.Errorf("after a change that keeps it, %s answers, want %s", got, first)
		}

		rest := slices.DeleteFunc(slices.Clone(others), func(s string) bool { return s == first })
		mustSync(t, b, keep(tcp(g.vip), day, rest...))
		second := chosen(g.vip)
		if second == first {
			t.Errorf("%s answers, which is gone", first)
		}
		mustSync(t, b, keep(tcp(g.vip), day, others...))
		if got := chosen(g.vip); got != second {
			t.Errorf("after the first is back, %s answers, want %s", got, second)
		}

		mustSync(t, b, keep(tcp(g.vip), lb.Affinity{ID: 1, Timeout: 1}, others...))
		wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 50), 50, others...)
		mustSync(t, b, keep(tcp(g.vip), day))
		wantErrors(t, pod.Connect(t, g.tcp, g.vip, 2), 2, unix.ECONNREFUSED)
		mustSync(t, b, to(tcp(g.vip), g.first, g.second, g.last))
		wantAnswers(t, pod.Connect(t, g.tcp, g.vip, 50), 50, others...)
	})
}

// Connects are spread evenly over five backends, by chi-square.
func TestUniform(t *testing.T) {
	pod := lbtest.StartPod(t)
	var backends []string
	for i := range 5 {
		backends = append(backends, fmt.Sprintf("127.0.0.%d:8080", i+1))
		pod.Listen(t, "tcp", backends[i])
	}
	b := mustLoad(t, pod, lb.Options{})
	mustSync(t, b, to(tcp(vip), backends...))

	const n = 5000
	got := pod.Connect(t, "tcp", vip, n)
	wantAnswers(t, got, n, backends...)
	expected, chiSquare := float64(n)/5, 0.0
	for _, backend := range backends {
		d := float64(got.Answers[backend]) - expected
		chiSquare += d * d / expected
	}
	const onceInAMillion = 33.4 // with 4 degrees of freedom
	if chiSquare > onceInAMillion {
		t.Errorf("chi-square is %.1f: %v", chiSquare, got.Answers)
	}
}

// No connect is lost or goes astray while its frontend and its neighbours change as fast as they can. The grace period
// is the shortest there is and all are in one bucket, so that regions and entries are used again at once.
func TestFlip(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{Services: 2, Backends: 64, Grace: 1})
		states := [][]string{{g.first}, {g.second, g.first}, {g.first, g.second, g.first, g.second}, {g.second}, {g.second, g.second, g.first}}
		mustSync(t, b, to(tcp(g.vip), states[0]...))

		stop := pod.Hammer(t, g.tcp, g.vip)
		flips := 0
		for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); flips++ {
			neighbour := lb.Change{Frontend: tcp(g.neighbour), Withdraw: flips%2 == 0}
			if !neighbour.Withdraw {
				neighbour = to(neighbour.Frontend, g.last)
			}
			c := to(tcp(g.vip), states[flips%len(states)]...)
			if flips%3 == 2 {
				c.Affinity = lb.Affinity{ID: 1, Timeout: time.Hour}
			}
			mustSync(t, b, c, neighbour)
		}
		got := stop()
		t.Logf("%d flips: %+v", flips, got)
		if got.Answers[g.last] > 0 || len(got.Errors) > 0 {
			t.Errorf("lost or astray: %+v", got)
		}
		if got.Answers[g.first] == 0 || got.Answers[g.second] == 0 {
			t.Errorf("want both backends seen, got %+v", got)
		}
	})
}

func TestFullMaps(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "tcp", "127.0.0.1:8080")

	t.Run("services", func(t *testing.T) {
		b := mustLoad(t, pod, lb.Options{Services: 2})
		first, second, third := tcp("10.96.0.1:80"), tcp("10.96.0.2:80"), tcp("10.96.0.3:80")
		err := b.Sync([]lb.Change{to(first, "127.0.0.1:8080"), to(second, "127.0.0.1:8080"), to(third, "127.0.0.1:8080")})
		wantFull(t, err, third)
		for _, f := range []lb.Frontend{first, second} {
			wantAnswers(t, pod.Connect(t, "tcp", f.Address.String(), 1), 1, "127.0.0.1:8080")
		}
		mustSync(t, b, to(third, "127.0.0.1:8080"), lb.Change{Frontend: first, Withdraw: true})
		wantAnswers(t, pod.Connect(t, "tcp", third.Address.String(), 1), 1, "127.0.0.1:8080")
	})
	t.Run("backends", func(t *testing.T) {
		b := mustLoad(t, pod, lb.Options{Backends: 16, Grace: time.Nanosecond})
		inline, small, large := tcp("10.96.0.1:80"), tcp("10.96.0.2:80"), tcp("10.96.0.3:80")
		backends := slices.Repeat([]string{"127.0.0.1:8080"}, 9)
		err := b.Sync([]lb.Change{to(large, backends...), to(small, backends[:5]...), to(inline, backends[:3]...)})
		wantFull(t, err, large)
		for _, f := range []lb.Frontend{inline, small} {
			wantAnswers(t, pod.Connect(t, "tcp", f.Address.String(), 5), 5, "127.0.0.1:8080")
		}
		wantErrors(t, pod.Connect(t, "tcp", large.Address.String(), 1), 1, unix.ENETUNREACH)
		mustSync(t, b, lb.Change{Frontend: small, Withdraw: true})
		mustSync(t, b, to(large, backends[:8]...))
		wantAnswers(t, pod.Connect(t, "tcp", large.Address.String(), 5), 5, "127.0.0.1:8080")
		if got, _ := b.Counts(); got.Frontends != 2 || got.Backends != 11 || got.Slots != got.BackendsCapacity {
			t.Errorf("want 2 frontends with 11 backends that fill the map, got %+v", got)
		}
	})
	// What was for all is not left so when there is no room for who it shall be for.
	t.Run("ranges", func(t *testing.T) {
		pinDir := lbtest.MountBPF(t)
		b := mustLoad(t, pod, lb.Options{Services: 2, PinDir: pinDir})
		defer b.Detach()
		if err := b.SetSources(cookieOf(t, pod), lb.Sources{IPv4: netip.MustParseAddr("10.9.8.7")}); err != nil {
			t.Fatal(err)
		}
		ranges := func(cidrs ...string) (prefixes []netip.Prefix) {
			for _, cidr := range cidrs {
				prefixes = append(prefixes, netip.MustParsePrefix(cidr))
			}
			return prefixes
		}
		guarded, other := to(tcp(vip), "127.0.0.1:8080"), to(tcp("10.96.0.11:80"), "127.0.0.1:8080")
		other.Ranges = ranges("10.1.0.0/16", "10.2.0.0/16")
		mustSync(t, b, guarded, other)
		wantAnswers(t, pod.Connect(t, "tcp", vip, 1), 1, "127.0.0.1:8080")
		guarded.Ranges = ranges("10.9.0.0/16", "10.3.0.0/16")
		wantFull(t, b.Sync([]lb.Change{guarded}), guarded.Frontend)
		wantErrors(t, pod.Connect(t, "tcp", vip, 1), 1, unix.ENETUNREACH)
		saved, err := b.Changes()
		if err != nil || len(saved) != 1 || saved[0].Frontend != other.Frontend {
			t.Errorf("want %v alone to be saved, got %v, %v", other.Frontend, saved, err)
		}
		dumped, err := lb.Dump(pinDir)
		if err != nil || len(dumped) != 2 || dumped[0].Ranges == nil || len(dumped[0].Ranges) != 0 || len(dumped[1].Ranges) != 2 {
			t.Errorf("want no clients of %v and two ranges of %v, got %v, %v", guarded.Frontend, other.Frontend, dumped, err)
		}

		other.Ranges = ranges("10.1.0.0/16")
		mustSync(t, b, other)
		wantFull(t, b.Sync([]lb.Change{guarded}), guarded.Frontend)
		wantAnswers(t, pod.Connect(t, "tcp", vip, 1), 1, "127.0.0.1:8080")
		mustSync(t, b, lb.Change{Frontend: other.Frontend, Withdraw: true})
		mustSync(t, b, guarded)
		wantAnswers(t, pod.Connect(t, "tcp", vip, 1), 1, "127.0.0.1:8080")
	})
}

// wantFull expects that one frontend, and no other, found no room.
func wantFull(t *testing.T, err error, frontend lb.Frontend) {
	t.Helper()
	var which *lb.FrontendError
	if !errors.Is(err, lb.ErrFull) || !errors.As(err, &which) || which.Frontend != frontend || strings.Count(err.Error(), "frontend") != 1 {
		t.Errorf("want an error that %v found no room, got %v", frontend, err)
	}
}

func TestSyncRefuses(t *testing.T) {
	pod := lbtest.StartPod(t)
	b := mustLoad(t, pod, lb.Options{})
	for name, change := range map[string]lb.Change{
		"frontend 0.0.0.0:80 is not the address of a host":       to(tcp("0.0.0.0:80"), "127.0.0.1:80"),
		"frontend [::]:80 is not the address of a host":          to(tcp("[::]:80"), "[::1]:80"),
		"frontend [fe80::1%lo]:80 is not the address of a host":  to(tcp("[fe80::1%lo]:80"), "[::1]:80"),
		"frontend [ff02::1]:80 is not the address of a host":     to(tcp("[ff02::1]:80"), "[::1]:80"),
		"frontend invalid AddrPort is not the address of a host": {Frontend: lb.Frontend{Protocol: lb.TCP}, Withdraw: true},
		"want TCP, UDP or SCTP":                                  {Frontend: lb.Frontend{Address: netip.MustParseAddrPort(vip)}},
		"scope 3 does not exist":                                 {Frontend: lb.Frontend{Address: netip.MustParseAddrPort(vip), Protocol: lb.TCP, Scope: 3}},
		"neither port nor protocol":                              {Frontend: lb.Frontend{Address: netip.MustParseAddrPort(vip), Scope: lb.Rest}},
		"range fd00::/8 is of another IP version":                {Frontend: tcp(vip), Ranges: []netip.Prefix{netip.MustParsePrefix("fd00::/8")}},
		"backend [fd00::2]:80 is of another IP version":          to(tcp(vip), "[fd00::2]:80"),
		"backend 127.0.0.1:80 is of another IP version":          to(tcp("[fd00:96::10]:80"), "127.0.0.1:80"),
		"backend 127.0.0.1:0 has no port":                        to(tcp(vip), "127.0.0.1:0"),
		"frontend 10.96.0.10:0 has no port":                      to(tcp("10.96.0.10:0"), "127.0.0.1:80"),
		"65536 backends: want at most 65535":                     {Frontend: tcp(vip), Backends: make([]netip.AddrPort, 65536)},
	} {
		if err := b.Sync([]lb.Change{change}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, got %v", name, err)
		}
	}
	for _, got := range counts(b) {
		if got.Frontends != 0 || got.Slots != 0 {
			t.Errorf("want nothing published, got %+v", got)
		}
	}
}

// counts are those of both IP versions.
func counts(b *lb.Balancer) [2]lb.Counts {
	ipv4, ipv6 := b.Counts()
	return [2]lb.Counts{ipv4, ipv6}
}

func TestAttachRefuses(t *testing.T) {
	root, err := lbtest.Cgroup2Mount()
	if err != nil {
		t.Skipf("skipped: %v", err)
	}
	b, err := lb.Load(lb.Options{})
	if err != nil {
		t.Skipf("skipped: %v", err)
	}
	defer b.Close()
	if _, err := os.Stat(root + "/cgroup.type"); errors.Is(err, os.ErrNotExist) {
		if err := b.Attach(root); !errors.Is(err, lb.ErrRootCgroup) {
			t.Errorf("root cgroup: want ErrRootCgroup, got %v", err)
		}
	}
	for _, folder := range []string{t.TempDir(), root + "/no-such-folder"} {
		if err := b.Attach(folder); err == nil || !strings.Contains(err.Error(), folder) {
			t.Errorf("want an error that names %s, got %v", folder, err)
		}
	}
}
