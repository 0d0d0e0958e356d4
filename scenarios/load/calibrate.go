// SPDX-License-Identifier: Apache-2.0

package load

import (
	"context"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// calibrateTurn is how long a calibration stays on one CPU before it goes on on the next.
	calibrateTurn = 50 * time.Millisecond
	// touched is how much slower than at the fastest readings a connect is at a reading that says: disturbed.
	touched = 1.03
	// binSlices and binWidth bound a bin from below: as many slices as its median needs to repeat within half a percent, and
	// as wide as the reference itself scatters at one speed.
	binSlices = 25
	binWidth  = 1.01
	// leastSlices is what a calibration must see to say anything.
	leastSlices = 4 * binSlices
)

// reading is one slice of a calibration: the slower of the references around it, and the median of its connects.
type reading struct {
	reference, connect time.Duration
}

// calibrate connects for as long as the request's limit, on one CPU after the other, and finds Reply.Quiet.
func (c *connects) calibrate(ctx context.Context) error {
	cpus, err := newCPUs()
	if err != nil {
		return err
	}
	c.base = time.Now()
	var seen []reading
	made, arrived := 0, -calibrateTurn
	for !c.over(ctx, time.Since(c.base)) {
		fresh := time.Since(c.base)-arrived >= calibrateTurn
		if fresh {
			if err := cpus.hop(); err != nil {
				return err
			}
			arrived = time.Since(c.base)
		}
		before := readReference(c.base)
		var took []int64
		began := time.Since(c.base)
		for first := true; first || time.Since(c.base)-began < slice; first = false {
			socket, err := c.socket(c.order[made%len(c.order)])
			if err != nil {
				return err
			}
			called, returned, errno := c.connect(socket)
			unix.Close(socket)
			made++
			if errno != 0 {
				c.reply.count(errnoName(errno))
				continue
			}
			took = append(took, int64(returned-called))
		}
		after := readReference(c.base)
		if fresh || len(took) == 0 {
			continue // the caches of this CPU are cold, or nothing was seen
		}
		slices.Sort(took)
		seen = append(seen, reading{max(before, after), time.Duration(took[len(took)/2])})
	}
	c.reply.Began, c.reply.Elapsed = c.base, time.Since(c.base)
	if err := ctx.Err(); err != nil {
		return err
	}
	c.reply.Quiet, err = quietLimit(seen)
	return err
}

// quietLimit is the slowest reading of the reference up to which connects are as fast as at its fastest readings.
//
// A machine shows by its connects which readings mean a disturbance. On one, another hardware thread in the core made the
// reference slower by 25 % and connects by 15 to 45 %, and undisturbed readings lay within 3 %; on another, getppid(2) itself
// took up to 14 % longer for seconds at a time, at which connects took 2 % longer.
func quietLimit(seen []reading) (time.Duration, error) {
	if len(seen) < leastSlices {
		return 0, fmt.Errorf("calibrate: %d slices of connects, at least %d are needed", len(seen), leastSlices)
	}
	slices.SortFunc(seen, func(a, b reading) int { return int(a.reference - b.reference) })
	// The very fastest readings are luck.
	fastest := seen[len(seen)/50].reference
	medianConnect := func(bin []reading) time.Duration {
		took := make([]time.Duration, len(bin))
		for i, r := range bin {
			took[i] = r.connect
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	// end is where the bin that begins at first ends: so wide, and of so many slices; past the last when there are too few.
	end := func(first int, width float64) int {
		i := first + binSlices
		for i < len(seen) && float64(seen[i].reference) < width*float64(seen[first].reference) {
			i++
		}
		return i
	}
	// The base is everything within the scatter of the reference at one speed.
	next := binSlices
	for next < len(seen) && float64(seen[next].reference) < touched*float64(fastest) {
		next++
	}
	base := medianConnect(seen[:next])
	for next < len(seen) {
		to := end(next, binWidth)
		if to > len(seen) || float64(medianConnect(seen[next:to])) > touched*float64(base) {
			break
		}
		next = to
	}
	return seen[next-1].reference, nil
}
