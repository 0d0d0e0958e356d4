// SPDX-License-Identifier: Apache-2.0

package load

import (
	"fmt"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Summary holds the figures of one series, in nanoseconds.
type Summary struct {
	Count              int
	P50, P90, P99, Max int64
	Mean               float64
}

// Summarize returns the exact figures of samples (nanoseconds, in any order, left as they are). A percentile is the smallest
// sample that at least so many per cent of the samples do not exceed (nearest rank), never an interpolation. Without
// samples all figures are zero.
func Summarize(samples []int64) Summary {
	if len(samples) == 0 {
		return Summary{}
	}
	sorted := slices.Sorted(slices.Values(samples))
	rank := func(percent int) int64 { return sorted[(len(sorted)*percent+99)/100-1] }
	var sum float64
	for _, s := range sorted {
		sum += float64(s)
	}
	return Summary{
		Count: len(sorted),
		P50:   rank(50), P90: rank(90), P99: rank(99), Max: sorted[len(sorted)-1],
		Mean: sum / float64(len(sorted)),
	}
}

// longest is the largest latency that a histogram holds.
const longest = time.Minute

// EncodeHistogram returns samples (nanoseconds) as an HdrHistogram with three significant digits, in the compressed V2 form
// as base64, which hdrhistogram's tools in all languages read. A sample above a minute is an error, never cut off; a time-out
// of a minute or less keeps them below.
func EncodeHistogram(samples []int64) ([]byte, error) {
	h := hdrhistogram.New(1, longest.Nanoseconds(), 3)
	for _, s := range samples {
		if s < 0 || s > longest.Nanoseconds() {
			return nil, fmt.Errorf("histogram: %d ns lies outside 0 to %s", s, longest)
		}
		if err := h.RecordValue(s); err != nil {
			return nil, fmt.Errorf("histogram: %w", err)
		}
	}
	encoded, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, fmt.Errorf("histogram: %w", err)
	}
	return encoded, nil
}

// DecodeHistogram reads what EncodeHistogram wrote. Its percentiles are within 0.1 % of the samples.
func DecodeHistogram(encoded []byte) (*hdrhistogram.Histogram, error) {
	h, err := hdrhistogram.Decode(encoded)
	if err != nil {
		return nil, fmt.Errorf("histogram: %w", err)
	}
	return h, nil
}
