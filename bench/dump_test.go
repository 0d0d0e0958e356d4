// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/plimsoll-bench/plimsoll/dataplane/lb"
	"github.com/plimsoll-bench/plimsoll/dataplane/lb/lbtest"
)

// dumpOf is what plimsoll dump says.
func dumpOf(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(t.Context(), &out, io.Discard, append([]string{"dump"}, args...))
	return out.String(), err
}

func TestDumpPrintsWhatIsCarried(t *testing.T) {
	needsConnectHook(t)
	dir := lbtest.MountBPF(t)
	b, err := lb.Load(lb.Options{PinDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	ap := netip.MustParseAddrPort
	err = b.Sync([]lb.Change{
		{Frontend: lb.Frontend{Address: ap("[fd00:96::10]:53"), Protocol: lb.UDP}, Backends: []netip.AddrPort{ap("[fd00::1]:5353")}, Lingering: []netip.AddrPort{ap("[fd00::2]:5353")}},
		{Frontend: lb.Frontend{Address: ap("10.96.0.10:80"), Protocol: lb.TCP}, Backends: []netip.AddrPort{ap("10.0.0.1:8080"), ap("10.0.0.2:8080")},
			Affinity: lb.Affinity{ID: 1, Timeout: 3 * time.Hour}},
		{Frontend: lb.Frontend{Address: ap("10.96.0.11:80"), Protocol: lb.TCP}},
		{Frontend: lb.Frontend{Address: ap("10.96.0.10:0"), Scope: lb.Rest}},
		{Frontend: lb.Frontend{Address: ap("192.0.2.1:80"), Protocol: lb.TCP, Scope: lb.Outside}, Backends: []netip.AddrPort{ap("10.0.0.1:8080")},
			Masquerade: true, Ranges: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}},
		{Frontend: lb.Frontend{Address: ap("192.0.2.2:80"), Protocol: lb.TCP}, Drop: true},
	})
	if err := errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	// No process holds the maps now.
	text, err := dumpOf(t, "--pin-dir", dir)
	want := `FRONTEND                       AFFINITY  CLIENTS          BACKENDS
10.96.0.10/other ports         none      all              none: refused
10.96.0.10:80/tcp              3h0m0s    all              10.0.0.1:8080 10.0.0.2:8080
10.96.0.11:80/tcp              none      all              none: refused
192.0.2.1:80/tcp from outside  none      198.51.100.0/24  10.0.0.1:8080 (masqueraded)
192.0.2.2:80/tcp               none      all              none: dropped
[fd00:96::10]:53/udp           none      all              [fd00::1]:5353 (lingering: [fd00::2]:5353)
`
	if err != nil || text != want {
		t.Errorf("want\n%s\ngot\n%s, %v", want, text, err)
	}
	text, err = dumpOf(t, "--pin-dir", dir, "-o", "json")
	text = strings.Join(strings.Fields(text), " ")
	want = `[ { "address": "10.96.0.10:0", "protocol": "any", "scope": "rest", "affinity_seconds": 0, "backends": [] }, ` +
		`{ "address": "10.96.0.10:80", "protocol": "tcp", "scope": "inside", "affinity_seconds": 10800, "backends": [ "10.0.0.1:8080", "10.0.0.2:8080" ] }, ` +
		`{ "address": "10.96.0.11:80", "protocol": "tcp", "scope": "inside", "affinity_seconds": 0, "backends": [] }, ` +
		`{ "address": "192.0.2.1:80", "protocol": "tcp", "scope": "outside", "affinity_seconds": 0, "source_ranges": [ "198.51.100.0/24" ], "masquerade": true, "backends": [ "10.0.0.1:8080" ] }, ` +
		`{ "address": "192.0.2.2:80", "protocol": "tcp", "scope": "inside", "affinity_seconds": 0, "drop": true, "backends": [] }, ` +
		`{ "address": "[fd00:96::10]:53", "protocol": "udp", "scope": "inside", "affinity_seconds": 0, "lingering": [ "[fd00::2]:5353" ], "backends": [ "[fd00::1]:5353" ] } ]`
	if err != nil || text != want {
		t.Errorf("want\n%s\ngot\n%s, %v", want, text, err)
	}
}

func TestDumpSaysWhatToDo(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{nil, "--pin-dir DIR"},
		{[]string{"--pin-dir", t.TempDir()}, "is an agent running with this --pin-dir?"},
		{[]string{"--pin-dir", "/", "-o", "yaml"}, `--output "yaml": want text or json`},
		{[]string{"10.96.0.10:80"}, "unknown command"},
	} {
		text, err := dumpOf(t, test.args...)
		if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") || text != "" {
			t.Errorf("%q: want an error with %q, got %q, %v", test.args, test.want, text, err)
		}
	}
}
