// SPDX-License-Identifier: Apache-2.0

package lb_test

import (
	"errors"
	"maps"
	"testing"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// TCP sockets have the names of their peers for as long as they are connected, however many there are, and use nothing up.
func TestPeerNamesOfMany(t *testing.T) {
	onEach(t, func(t *testing.T, pod *lbtest.Pod, g ground) {
		b := mustLoad(t, pod, lb.Options{PeerNames: true})
		mustSync(t, b, to(tcp(g.vip), g.first, g.second), to(tcp(g.neighbour), g.first))
		pod.Hold(t, g.tcp, g.vip, 500)
		pod.Hold(t, g.tcp, g.neighbour, 500)
		pod.Hold(t, g.tcp, g.first, 10) // no Service
		want := map[string]int{g.vip: 500, g.neighbour: 500, g.first: 10}
		wantHeld(t, pod, want)
		wantStreams(t, b, 1000)
		pod.LetGo(t)
		wantStreams(t, b, 0)

		// All places are somebody else's: then the sockets keep it themselves, and leave alone what is not theirs.
		streams := b.Streams()
		indexes, strangers := make([]uint32, streams.MaxEntries()), make([][8]uint64, streams.MaxEntries())
		for i := range indexes {
			indexes[i], strangers[i][0] = uint32(i), 1<<63
		}
		if _, err := streams.BatchUpdate(indexes, strangers, nil); err != nil {
			t.Fatal(err)
		}
		pod.Hold(t, g.tcp, g.vip, 20)
		pod.Hold(t, g.tcp, g.neighbour, 20)
		wantHeld(t, pod, map[string]int{g.vip: 20, g.neighbour: 20})
		pod.LetGo(t)
		wantStreams(t, b, int(streams.MaxEntries()))
	})
}

// A socket that is connected again has the name of where it is connected now.
func TestPeerNamesOfOneSocket(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "tcp", "127.0.0.1:8080")
	b := mustLoad(t, pod, lb.Options{PeerNames: true})
	mustSync(t, b, to(tcp(vip), "127.0.0.1:8080"), to(tcp("10.96.0.11:80"), "127.0.0.1:8080"))
	pod.Hold(t, "tcp4", vip, 3)
	for _, address := range []string{"10.96.0.11:80", vip, "127.0.0.1:8080", vip} {
		pod.Reconnect(t, address)
		// The socket that was connected to a Service with this backend before is taken to be there still.
		if address != "127.0.0.1:8080" {
			wantHeld(t, pod, map[string]int{address: 3})
		}
		wantStreams(t, b, 3)
	}
}

// Names outlive the process that gave them, and end with the wish for them.
func TestPinnedPeerNames(t *testing.T) {
	pod := lbtest.StartPod(t)
	pod.Listen(t, "tcp", "127.0.0.1:8080")
	pinDir := lbtest.MountBPF(t)
	load := func(names bool) *lb.Balancer {
		b, err := lb.Load(lb.Options{PinDir: pinDir, PeerNames: names})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Attach(pod.Cgroup); err != nil {
			t.Fatal(err)
		}
		mustSync(t, b, to(tcp(vip), "127.0.0.1:8080"))
		return b
	}
	closed := func(b *lb.Balancer) {
		t.Helper()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	closed(load(true))
	pod.Hold(t, "tcp", vip, 3)
	wantHeld(t, pod, map[string]int{vip: 3})
	closed(load(true))
	wantHeld(t, pod, map[string]int{vip: 3})
	closed(load(false))
	wantHeld(t, pod, map[string]int{"127.0.0.1:8080": 3})
	pod.LetGo(t)

	last := load(true)
	wantStreams(t, last, 0) // of sockets that were closed meanwhile
	pod.Hold(t, "tcp", vip, 3)
	wantHeld(t, pod, map[string]int{vip: 3})
	if err := errors.Join(last.Detach(), last.Close()); err != nil {
		t.Fatal(err)
	}
}

// wantStreams fails the test unless so many sockets have names in the map.
func wantStreams(tb testing.TB, b *lb.Balancer, want int) {
	tb.Helper()
	var index uint32
	var stream [8]uint64
	got, all := 0, b.Streams().Iterate()
	for all.Next(&index, &stream) {
		if stream[0] != 0 {
			got++
		}
	}
	if err := all.Err(); err != nil {
		tb.Fatal(err)
	}
	if got != want {
		tb.Errorf("want %d streams in the map, got %d", want, got)
	}
}

// wantHeld fails the test unless the held sockets have these peers.
func wantHeld(tb testing.TB, pod *lbtest.Pod, want map[string]int) {
	tb.Helper()
	if got := pod.HeldPeers(tb); !maps.Equal(got, want) {
		tb.Errorf("want the peers %v, got %v", want, got)
	}
}
