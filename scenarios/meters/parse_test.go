// SPDX-License-Identifier: Apache-2.0

package meters

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	if got, err := parseUsage("usage_usec 1500\nuser_usec 1000\n"); got != 1500*time.Microsecond || err != nil {
		t.Errorf("cpu.stat: %s, %v", got, err)
	}
	const kthread = "14 (ksoftirqd/0 (x)) S 2 0 0 0 -1 69238848 0 0 0 0 0 50 0 0 20 0 1 0 17 0 0"
	if got, err := parseTask(kthread); got != (task{kernel: true, started: 17}) || err != nil {
		t.Errorf("kernel thread: %+v, %v", got, err)
	}
	if got, err := parseTask("1 (init) S 0 1 1 0 -1 4194560 0 0 0 0 0 50 0 0 20 0 1 0 5 0"); got != (task{started: 5}) || err != nil {
		t.Errorf("process: %+v, %v", got, err)
	}
	stats, err := parseStat("cpu  1 2 3 400 50 6 7 8 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\ncpu1 0 0 0 0 0 0 0 0 0 0\nintr 5 0\n")
	if want := (stat{idle: 450, interrupts: 13, steal: 8, cpus: 2}); stats != want || err != nil {
		t.Errorf("stat: %+v, %v; want %+v", stats, err, want)
	}
	memory, err := parseRollup("5000-6000 ---p 0 00:00 0 [rollup]\nRss:  40 kB\nPss:  30 kB\nPss_Anon: 1 kB\nAnonymous:  20 kB\n")
	if want := (Memory{RSS: 40 << 10, PSS: 30 << 10, Anonymous: 20 << 10, Processes: 1}); memory != want || err != nil {
		t.Errorf("smaps_rollup: %+v, %v; want %+v", memory, err, want)
	}
}

func TestHasLine(t *testing.T) {
	const config = "# CONFIG_IRQ_TIME_ACCOUNTING is not set\nCONFIG_HZ=250\n"
	if hasLine(strings.NewReader(config), "CONFIG_IRQ_TIME_ACCOUNTING=y") || !hasLine(strings.NewReader(config), "CONFIG_HZ=250") {
		t.Error("the configuration is misread")
	}
}

// FuzzParse feeds one text to all parsers: none may panic, and none may return a value that cannot be.
func FuzzParse(f *testing.F) {
	for _, file := range []string{"/proc/stat", "/proc/self/stat", "/proc/self/smaps_rollup"} {
		if content, err := os.ReadFile(file); err == nil {
			f.Add(string(content))
		}
	}
	f.Add("usage_usec 18446744073709551615\n")
	f.Add("Rss: 99999999999999999999 kB\n")
	f.Add("1 () S")
	f.Fuzz(func(t *testing.T, text string) {
		if used, err := parseUsage(text); err == nil && used < 0 {
			t.Errorf("cpu.stat: %s", used)
		}
		if s, err := parseStat(text); err == nil && s.cpus < 1 {
			t.Errorf("stat: %+v", s)
		}
		if m, err := parseRollup(text); err == nil && (m.RSS < 0 || m.PSS < 0 || m.Anonymous < 0) {
			t.Errorf("smaps_rollup: %+v", m)
		}
		parseTask(text)
	})
}

func BenchmarkRead(b *testing.B) {
	site := Site{Client: mustCgroup(b)}
	for b.Loop() {
		mustRead(b, site)
	}
}
