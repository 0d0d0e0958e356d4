// SPDX-License-Identifier: Apache-2.0

package agent

// A signal says that something has happened since it was received last, however often.
type signal chan struct{}

func newSignal() signal { return make(signal, 1) }

// give never waits.
func (s signal) give() {
	select {
	case s <- struct{}{}:
	default:
	}
}
