// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// What is pinned goes on without its process, and is taken over by the next one.
func TestPins(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "tcp", "127.0.0.1:8080")
	pod.Listen(t, "tcp", "127.0.0.2:8080")
	pod.Listen(t, "tcp", "[::1]:8080")
	options := lb.Options{PinDir: lbtest.MountBPF(t)}
	load := func() *lb.Balancer {
		b, err := lb.Load(options)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Attach(pod.Cgroup); err != nil {
			t.Fatal(err)
		}
		return b
	}
	other := tcp("10.96.0.11:80")

	first := load()
	many := to(tcp("10.96.0.12:80"), slices.Repeat([]string{"127.0.0.1:8080", "127.0.0.2:8080"}, 3)...)
	six := to(tcp("[fd00:96::10]:80"), "[::1]:8080")
	mustSync(t, first, to(tcp(vip), "127.0.0.1:8080"), to(other, "127.0.0.1:8080", "127.0.0.2:8080"), many, six)
	before := counts(first)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	wantAnswers(t, pod.Connect(t, "tcp", vip, 1), 1, "127.0.0.1:8080")

	stop := pod.Hammer(t, "tcp", vip)
	second := load()
	if got := counts(second); got != before {
		t.Errorf("taken over: want %+v, got %+v", before, got)
	}
	frontends := slices.SortedFunc(second.Frontends(), func(a, b lb.Frontend) int { return a.Address.Compare(b.Address) })
	if want := []lb.Frontend{tcp(vip), other, many.Frontend, six.Frontend}; !slices.Equal(frontends, want) {
		t.Errorf("taken over: want %v, got %v", want, frontends)
	}
	want := []lb.Change{to(tcp(vip), "127.0.0.1:8080"), to(other, "127.0.0.1:8080", "127.0.0.2:8080"), many, six}
	if dumped, err := lb.Dump(options.PinDir); err != nil || !reflect.DeepEqual(dumped, want) {
		t.Errorf("dump: want %v, got %v, %v", want, dumped, err)
	}
	mustSync(t, second, to(tcp(vip), "127.0.0.2:8080"))
	got := stop()
	wantAnswers(t, got, got.Answers["127.0.0.1:8080"]+got.Answers["127.0.0.2:8080"], slices.Collect(maps.Keys(got.Answers))...)
	wantAnswers(t, pod.Connect(t, "tcp", vip, 5), 5, "127.0.0.2:8080")
	wantAnswers(t, pod.Connect(t, "tcp", six.Frontend.Address.String(), 5), 5, "[::1]:8080")
	for _, f := range []lb.Frontend{other, many.Frontend} {
		wantAnswers(t, pod.Connect(t, "tcp", f.Address.String(), 5), 5, "127.0.0.1:8080", "127.0.0.2:8080")
	}

	if err := errors.Join(second.Detach(), second.Close()); err != nil {
		t.Fatal(err)
	}
	wantErrors(t, pod.Connect(t, "tcp", vip, 1), 1, unix.ENETUNREACH)
}

// What a Balancer of another layout or of other sizes left serves until it is superseded, and then no longer; folders of somebody else
// stay.
func TestSupersede(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "tcp", "127.0.0.1:8080")
	dir := lbtest.MountBPF(t)
	load := func(services int) *lb.Balancer {
		b, err := lb.Load(lb.Options{PinDir: dir, Services: services})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Attach(pod.Cgroup); err != nil {
			t.Fatal(err)
		}
		return b
	}
	folders := func() (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.IsDir() { // the kernel may put files there
				names = append(names, e.Name())
			}
		}
		return names
	}
	former := load(0)
	mustSync(t, former, to(tcp(vip), "127.0.0.1:8080"))
	if err := former.Close(); err != nil {
		t.Fatal(err)
	}
	layout := folders()[0]
	err := errors.Join(os.Rename(filepath.Join(dir, layout), filepath.Join(dir, "v0")), os.Mkdir(filepath.Join(dir, "versions"), 0o700))
	if err != nil {
		t.Fatal(err)
	}

	for _, services := range []int{0, 64, 128} {
		b := load(services)
		wantAnswers(t, pod.Connect(t, "tcp", vip, 5), 5, "127.0.0.1:8080")
		if known := slices.Collect(b.Frontends()); len(known) != 0 {
			t.Errorf("with %d Services, taken over: %v, want none", services, known)
		}
		if services == 64 { // it ends before it knows any
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := b.Supersede(); err != nil {
			t.Fatal(err)
		}
		wantErrors(t, pod.Connect(t, "tcp", vip, 1), 1, unix.ENETUNREACH)
		if got, want := folders(), []string{layout, "versions"}; !slices.Equal(got, want) {
			t.Errorf("in the folder there is %v, want %v", got, want)
		}
		mustSync(t, b, to(tcp(vip), "127.0.0.1:8080"))
		wantAnswers(t, pod.Connect(t, "tcp", vip, 5), 5, "127.0.0.1:8080")
		end := b.Close
		if services == 128 {
			end = func() error { return errors.Join(b.Supersede(), b.Detach(), b.Close()) }
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
	}
}

// A dump shows each frontend as it was at one moment, though it is changed meanwhile.
func TestDumpOfWhatChanges(t *testing.T) {
	for _, frontend := range []lb.Frontend{tcp(vip), tcp("[fd00:96::10]:80")} {
		t.Run(frontend.String(), func(t *testing.T) {
			options := lb.Options{PinDir: lbtest.MountBPF(t), Services: 64, Grace: time.Millisecond}
			b, err := lb.Load(options)
			if errors.Is(err, lb.ErrNotSupported) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			// Backends of one set have its number as their port; small ones of IPv4 stand in the entry, large ones do not.
			set := func(number, size int) lb.Change {
				c := lb.Change{Frontend: frontend}
				if number > 4 {
					c.Affinity = lb.Affinity{ID: uint64(number), Timeout: time.Duration(number)}
				}
				for i := range size {
					address := netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})
					if frontend.Address.Addr().Is6() {
						address = netip.AddrFrom16([16]byte{0: 0xfd, 15: byte(i + 1)})
					}
					c.Backends = append(c.Backends, netip.AddrPortFrom(address, uint16(number)))
				}
				return c
			}
			sizes := map[uint16]int{1: 1, 2: 3, 3: 100, 4: 2, 5: 40, 6: 3}
			stop, done := make(chan struct{}), make(chan error, 1)
			go func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						done <- nil
						return
					default:
					}
					number := n%len(sizes) + 1
					if err := b.Sync([]lb.Change{set(number, sizes[uint16(number)])}); err != nil {
						done <- err
						return
					}
				}
			}()
			seen := map[uint16]int{}
			for range 300 {
				dumped, err := lb.Dump(options.PinDir)
				if err != nil {
					t.Error(err)
					break
				}
				if len(dumped) == 0 {
					continue // it was not published yet
				}
				number := dumped[0].Backends[0].Port()
				seen[number]++
				want := set(int(number), sizes[number])
				want.Affinity = dumped[0].Affinity // it changes in words of its own, a moment before the backends
				if !reflect.DeepEqual(dumped, []lb.Change{want}) {
					t.Errorf("a dump shows what never was: %v", dumped)
					break
				}
			}
			close(stop)
			if err := errors.Join(<-done, b.Close()); err != nil {
				t.Error(err)
			}
			if len(seen) < 2 {
				t.Errorf("the dumps saw the sets %v only", seen)
			}
		})
	}
}
