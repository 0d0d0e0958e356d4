// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSummarize(t *testing.T) {
	for name, test := range map[string]struct {
		samples []int64
		want    Summary
	}{
		"none":      {nil, Summary{}},
		"one":       {[]int64{7}, Summary{1, 7, 7, 7, 7, 7}},
		"two":       {[]int64{9, 1}, Summary{2, 1, 9, 9, 9, 5}},
		"a hundred": {descending(100), Summary{100, 50, 90, 99, 100, 50.5}},
		"101":       {descending(101), Summary{101, 51, 91, 100, 101, 51}},
	} {
		before := slices.Clone(test.samples)
		if got := Summarize(test.samples); got != test.want {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
		if !slices.Equal(before, test.samples) {
			t.Errorf("%s: the samples were changed", name)
		}
	}
}

// descending returns n, n-1, …, 1.
func descending(n int) (samples []int64) {
	for i := n; i > 0; i-- {
		samples = append(samples, int64(i))
	}
	return samples
}

func TestHistogramKeepsEverySample(t *testing.T) {
	samples := []int64{0, 1, 16_012, 16_020, 19_400, 91_000, 1_000_000, time.Minute.Nanoseconds()}
	encoded, err := EncodeHistogram(samples)
	if err != nil {
		t.Fatal(err)
	}
	h, err := DecodeHistogram(encoded)
	if err != nil {
		t.Fatal(err)
	}
	if h.TotalCount() != int64(len(samples)) {
		t.Errorf("%d samples came back of %d", h.TotalCount(), len(samples))
	}
	for _, s := range samples {
		percent := 100 * float64(slices.Index(samples, s)+1) / float64(len(samples))
		if got := h.ValueAtPercentile(percent); math.Abs(float64(got-s)) > 0.001*float64(s) {
			t.Errorf("percentile %g is %d, want %d within 0.1 %%", percent, got, s)
		}
	}
}

func TestHistogramRefusesWhatItCannotHold(t *testing.T) {
	for _, s := range []int64{-1, time.Minute.Nanoseconds() + 1} {
		if _, err := EncodeHistogram([]int64{5, s}); err == nil {
			t.Errorf("%d ns: no error", s)
		}
	}
	if _, err := DecodeHistogram([]byte("not a histogram")); err == nil {
		t.Error("decoded what is none")
	}
}

func TestOrderUsesAddressesEquallyOften(t *testing.T) {
	for _, test := range []struct{ n, count int }{{1, 5}, {3, 10}, {7, 7}, {50_000, 2_000}, {2, 0}} {
		indices := order(1, 1, test.n, test.count)
		if len(indices) != test.count {
			t.Fatalf("%+v: %d operations", test, len(indices))
		}
		used := make([]int, test.n)
		for _, i := range indices {
			used[i]++
		}
		if low, high := slices.Min(used), slices.Max(used); high-low > 1 {
			t.Errorf("%+v: one address is used %d times, another %d times", test, low, high)
		}
		if !slices.Equal(indices, order(1, 1, test.n, test.count)) {
			t.Errorf("%+v: the same seed gives another order", test)
		}
	}
	if slices.Equal(order(1, 1, 1000, 1000), order(2, 1, 1000, 1000)) {
		t.Error("another seed gives the same order")
	}
}

func TestReadListenCounts(t *testing.T) {
	if _, err := readListenCounts(); err != nil {
		t.Error(err)
	}
}

func FuzzParseListenCounts(f *testing.F) {
	f.Add("TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 0 12 13\nIpExt: InNoRoutes\nIpExt: 0\n")
	f.Add("TcpExt: ListenOverflows ListenDrops\n")
	f.Add("TcpExt: ListenOverflows ListenDrops\nTcpExt: 1\n")
	if content, err := os.ReadFile("/proc/self/net/netstat"); err == nil {
		f.Add(string(content))
	}
	f.Fuzz(func(t *testing.T, netstat string) {
		counts, err := parseListenCounts(netstat)
		if err == nil && (!strings.Contains(netstat, "ListenOverflows") || !strings.Contains(netstat, "TcpExt:")) {
			t.Errorf("found %+v in a text that does not hold them", counts)
		}
	})
}
