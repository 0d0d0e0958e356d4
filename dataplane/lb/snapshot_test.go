// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func someSnapshot() Snapshot {
	return Snapshot{Time: time.Unix(1, 0).UTC(), Node: "here", Frontends: []Change{
		{
			Frontend: Frontend{Address: netip.MustParseAddrPort("10.96.0.10:80"), Protocol: TCP, Scope: Outside},
			Backends: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:8080")}, Affinity: Affinity{ID: 7, Timeout: time.Hour},
			Masquerade: true, Ranges: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		},
		{Frontend: Frontend{Address: netip.MustParseAddrPort("[fd00::1]:53"), Protocol: UDP}, Drop: true, Lingering: []netip.AddrPort{netip.MustParseAddrPort("[fd00::2]:53")}},
	}}
}

func TestSnapshot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "snapshot")
	want := someSnapshot()
	for range 2 { // once where there is none, once in the place of another
		if err := want.Write(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadSnapshot(path, "here")
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("want %+v, got %+v, %v", want, got, err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("want one file, got %v, %v", left, err)
	}
	if _, err := ReadSnapshot(path, "there"); err == nil || !strings.Contains(err.Error(), `of the node "here"`) {
		t.Errorf("want another node's file refused, got %v", err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, b := range map[string][]byte{
		"nothing": {}, "cut": whole[:len(whole)-1], "its first line alone": whole[:bytes.IndexByte(whole, '\n')+1],
		"another version": bytes.Replace(whole, []byte("snapshot-1"), []byte("snapshot-2"), 1),
		"a changed byte":  bytes.Replace(whole, []byte("10.96"), []byte("10.97"), 1),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadSnapshot(path, "here"); err == nil {
			t.Errorf("%s is taken for a snapshot", what)
		}
	}
	if err := want.Write(filepath.Join(t.TempDir(), "none", "snapshot")); err == nil {
		t.Error("want an error where there is no folder")
	}
}

// Whatever a file holds, reading it gives an error or what can be written again, and a load balancer that is given it stands.
func FuzzSnapshot(f *testing.F) {
	b, err := someSnapshot().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, false)
	f.Add(b[bytes.IndexByte(b, '\n')+1:], true)
	f.Add([]byte(`{"Frontends":[{"Frontend":{"Address":"","Protocol":300},"Backends":["0.0.0.0:0"],"Ranges":["::/0"]}]}`), true)
	balancer, err := Load(Options{Services: 64, Backends: 64, Grace: 1})
	if errors.Is(err, ErrNotSupported) {
		f.Skipf("skipped: %v", err)
	}
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := balancer.Close(); err != nil {
			f.Error(err)
		}
	})
	f.Fuzz(func(t *testing.T, data []byte, signed bool) {
		if signed { // what a disk would not do to a file, but another program
			data = sign(data)
		}
		s, err := decodeSnapshot(data)
		if err != nil {
			return
		}
		if _, err := s.encode(); err != nil {
			t.Errorf("what was read cannot be written: %v", err)
		}
		if err := balancer.Sync(s.Frontends); err != nil {
			t.Logf("not used: %v", err)
		}
		held, err := balancer.Changes()
		if err != nil {
			t.Error(err)
		}
		for i := range held {
			held[i] = Change{Frontend: held[i].Frontend, Withdraw: true}
		}
		if err := balancer.Sync(held); err != nil {
			t.Errorf("what was published cannot be withdrawn: %v", err)
		}
		if ipv4, ipv6 := balancer.Counts(); ipv4.Entries+ipv6.Entries > 0 || len(balancer.addresses.are)+len(balancer.ranges.of)+len(balancer.lingering.of) > 0 {
			t.Errorf("something is left: %+v, %+v, %v", ipv4, ipv6, balancer.ranges.of)
		}
	})
}
